"""Programs are kept only where nobody else could have put them, and compute the same bits."""

import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as cc

from sync_jax.runtime import compilation_cache


@pytest.fixture(autouse=True)
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


def test_the_folder_is_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.use("~/a/cache") is None
    used = Path(jax.config.jax_compilation_cache_dir)
    assert used.parent == tmp_path / "a" / "cache"
    for folder in (used, used.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


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


def test_what_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    for folder in (f"{tmp_path}/file", f"{tmp_path}/file/cache", "/proc/cache", "~nobody9/x"):
        reason = compilation_cache.use(folder)
        assert reason is not None
        assert reason.startswith("compiled programs are not kept: ")
        assert "\n" not in reason
    assert jax.config.jax_compilation_cache_dir is None


def test_the_users_choice_takes_precedence(tmp_path):
    assert compilation_cache.use("") is None
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "mine")
    assert compilation_cache.use(str(tmp_path / "cache")) is None
    assert jax.config.jax_compilation_cache_dir == "mine"
    assert not (tmp_path / "cache").exists()


def test_a_program_from_the_cache_computes_the_same_bits(tmp_path, monkeypatch):
    """As newly compiled: gradients of a convolution and BatchNorm, by which rounding differs."""
    monkeypatch.setattr(compilation_cache, "_SECONDS", 0.0)  # tests compile quickly
    hits: list[str] = []
    images = jax.random.normal(jax.random.key(0), (16, 14, 14, 3))
    kernel = jax.random.normal(jax.random.key(1), (8, 3, 3, 3))

    def loss(kernel, images):
        x = jax.lax.conv(images.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME")
        x = (x - x.mean((0, 2, 3), keepdims=True)) / (x.std((0, 2, 3), keepdims=True) + 1e-5)
        return jnp.sum(jnp.tanh(x) ** 2)

    def compute():
        step = jax.jit(jax.value_and_grad(lambda kernel, images: loss(kernel, images)))
        return jax.device_get(step(kernel, images)), len(hits)

    def listener(event, **_):
        hits.extend([event] if event.endswith("/cache_hits") else [])

    jax.monitoring.register_event_listener(listener)
    try:
        compilation_cache.use(str(tmp_path / "cache"))
        cold, warm = compute(), compute()  # each compiles a program of its own
    finally:
        jax.monitoring.unregister_event_listener(listener)
    assert (cold[1], warm[1]) == (0, 1)
    chex.assert_trees_all_equal(cold[0], warm[0])
    assert 0 < np.abs(cold[0][1]).max() < np.inf
