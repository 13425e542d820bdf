"""Programs are kept only where nobody else could have put them, and compute the same bits."""

import os
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as cc

from sync_jax.data import registry
from sync_jax.data.splits import load_train_and_calibration
from sync_jax.runtime import compilation_cache, sharding
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
def test_the_folder_is_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.use("~/a/cache") is None
    used = jax.config.jax_compilation_cache_dir
    assert os.path.dirname(used) == str(tmp_path / "a" / "cache")
    for folder in (used, os.path.dirname(used)):
        assert os.stat(folder).st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("no_cache")
def test_a_folder_that_others_could_write_to_or_replace_is_not_used(tmp_path, monkeypatch):
    def refused(folder: Path) -> str:
        jax.config.update("jax_compilation_cache_dir", None)
        reason = compilation_cache.use(str(folder)) or ""
        assert (jax.config.jax_compilation_cache_dir is None) == bool(reason)
        return reason

    cache = tmp_path / "cache"
    assert refused(cache) == ""
    (inner,) = cache.iterdir()
    for folder in (cache, inner):
        for mode in (0o770, 0o702, 0o744):
            folder.chmod(mode)
            assert f"{folder} is open to others" in refused(cache)
        folder.chmod(0o700)
    tmp_path.chmod(0o777)
    assert "above it, can be written by others" in refused(cache)
    tmp_path.chmod(0o1777)  # as /tmp
    assert refused(cache) == ""
    (tmp_path / "link").symlink_to(cache)
    assert "link is no folder" in refused(tmp_path / "link")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert "cache is another user's" in refused(cache)


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
def test_the_users_choice_takes_precedence(tmp_path):
    assert compilation_cache.use("") is None
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "mine")
    assert compilation_cache.use(str(tmp_path / "cache")) is None
    assert jax.config.jax_compilation_cache_dir == "mine"
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
def test_a_program_from_the_cache_computes_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_SECONDS", 0.0)  # tests compile quickly
    data_dir = tiny.prepare(tmp_path)
    config = tiny.config(data_dir)
    events: list[str] = []

    def three_steps():
        run = tiny.trainer(config, sharding.make_mesh(jax.devices()[:1]))
        part, _ = load_train_and_calibration(registry.dataset(config.data), config.data)
        feed, (state, _) = run.feed(part, 0), run.create_state()
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
