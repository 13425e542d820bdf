"""Programs are kept only where nobody else could have put them, and compute the same bits."""

import os

import chex
import jax
import numpy as np
import pytest
from jax._src.compilation_cache import compress_executable
from jax.experimental.compilation_cache import compilation_cache as cc

from sync_jax.data import registry
from sync_jax.data.splits import load_train_and_calibration
from sync_jax.runtime import compilation_cache, sharding
from sync_jax.trainer import Run
from tests import tiny


@pytest.fixture
def no_cache():
    """As a user's process begins; the session's cache is put back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    cc.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cc.reset_cache()


@pytest.mark.usefixtures("no_cache")
def test_the_folder_is_made_for_the_user_alone(tmp_path):
    assert compilation_cache.use(str(tmp_path / "a" / "cache")) is None
    used = jax.config.jax_compilation_cache_dir
    assert os.path.dirname(used) == str(tmp_path / "a" / "cache")
    for folder in (used, os.path.dirname(used)):
        assert os.stat(folder).st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("no_cache")
def test_home_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.use("~/cache") is None
    assert jax.config.jax_compilation_cache_dir.startswith(f"{tmp_path}/cache/")


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o744])
@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_open_to_others_is_not_used(mode, inner, tmp_path):
    compilation_cache.use(str(tmp_path / "cache"))
    folder = tmp_path / "cache"
    folder = next(folder.iterdir()) if inner else folder
    folder.chmod(mode)
    jax.config.update("jax_compilation_cache_dir", None)
    assert "is open to others" in (compilation_cache.use(str(tmp_path / "cache")) or "")
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_cache")
def test_a_folder_that_others_could_replace_is_not_used(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert "above it, can be written by others" in (compilation_cache.use(f"{shared}/cache") or "")
    shared.chmod(0o1777)  # as /tmp
    assert compilation_cache.use(f"{shared}/cache") is None


@pytest.mark.usefixtures("no_cache")
def test_another_users_folder_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(mode=0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert "cache is another user's" in (compilation_cache.use(str(tmp_path / "cache")) or "")
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_cache")
def test_a_link_is_no_folder(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    assert "cache is no folder" in (compilation_cache.use(str(tmp_path / "cache")) or "")


@pytest.mark.usefixtures("no_cache")
def test_what_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    for folder in (f"{tmp_path}/file", f"{tmp_path}/file/cache", "/proc/cache", "~nobody9/x"):
        reason = compilation_cache.use(folder)
        assert reason is not None
        assert reason.startswith("compiled programs are not kept: ")
        assert "\n" not in reason
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_cache")
def test_the_users_choice_goes_before_it(tmp_path):
    assert compilation_cache.use("") is None
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "mine")
    assert compilation_cache.use(str(tmp_path / "cache")) is None
    assert jax.config.jax_compilation_cache_dir == "mine"
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_cache")
def test_the_oldest_go_when_there_is_no_room(tmp_path, monkeypatch):
    compilation_cache.use(str(tmp_path))
    folder = next(tmp_path.iterdir())
    for age, name in enumerate("abc"):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (1000 - age, 1000 - age))
    monkeypatch.setattr(compilation_cache, "_BYTES", 150)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.use(str(tmp_path))
    assert {path.name for path in folder.iterdir()} == {"a", "whole-until"}


@pytest.mark.usefixtures("no_cache")
def test_half_written_programs_go(tmp_path):
    """JAX warns of them at each start, compiles anew, and leaves them there."""
    compilation_cache.use(str(tmp_path))
    folder = next(tmp_path.iterdir())
    whole = compress_executable(np.random.default_rng(0).bytes(1000))
    files = {"whole": whole, "half": whole[:500], "empty": b"", "zeros": bytes(1000)}
    for name, content in files.items():
        (folder / f"{name}-cache").write_bytes(content)
    jax.config.update("jax_compilation_cache_dir", None)
    assert compilation_cache.use(str(tmp_path)) is None
    assert [path.name for path in folder.glob("*-cache")] == ["whole-cache"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
def test_a_program_from_the_cache_computes_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_SECONDS", 0.0)  # tests compile quickly
    data_dir = tiny.prepare(tmp_path)
    config = tiny.config(data_dir)
    events: list[str] = []

    def three_steps():
        run = Run(config, sharding.make_mesh(jax.devices()[:1]), train_size=190)
        part, _ = load_train_and_calibration(registry.dataset(config.data), config.data)
        feed, state = run.feed(part, 0), run.create_state()
        hits = events.count("/jax/compilation_cache/cache_hits")
        for _ in range(3):
            state, metrics = run.step(state, next(feed))
        return state, metrics, events.count("/jax/compilation_cache/cache_hits") - hits

    listener = lambda event, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        compilation_cache.use(str(tmp_path / "cache"))
        cold, warm = three_steps(), three_steps()  # each compiles a step of its own
    finally:
        jax.monitoring.unregister_event_listener(listener)
    assert warm[2] > cold[2]
    assert [x.name[:9] for x in (tmp_path / "cache").rglob("jit_steps-*-cache")] == ["jit_steps"]
    chex.assert_trees_all_equal(cold[:2], warm[:2])
    assert np.isfinite(cold[1].values).all()
