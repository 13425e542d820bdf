"""The libraries that a PyTorch user may want alone."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("package", "name"), [("metrics", "aurc"), ("guarantees", "sgr")])
def test_importable_without_jax_or_a_dataset_library(package, name):
    """They need NumPy and SciPy; guarantees takes its checks of arguments from metrics."""
    code = (
        f"import sys; from sync_jax.{package} import {name}; "
        "heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'grain', 'matplotlib'}; "
        "loaded = {module.split('.')[0] for module in sys.modules}; "
        "ours = {'.'.join(module.split('.')[:2]) for module in sys.modules "
        "if module.startswith('sync_jax.')}; "
        f"assert not heavy & loaded and ours == {{'sync_jax.metrics', 'sync_jax.{package}'}}, "
        "(heavy & loaded, ours)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("module", "heavy"), [
    ("configs.cifar100", ("flax", "orbax", "grain", "tensorflow_datasets", "matplotlib")),
    ("sync_jax", ("jax", "numpy")),
    ("sync_jax.main", ("jax", "scipy")),  # --helpshort waits for what this imports
])  # fmt: skip
def test_what_is_light_to_import(module, heavy):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    root = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root
    ).stdout.split()
    assert not {*heavy} & {*found}
