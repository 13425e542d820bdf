"""Lists the packages: all below sync_jax/, and configs/ as sync_jax.configs. Else: setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sync_jax", "sync_jax.*"]), "sync_jax.configs"],
    package_dir={"sync_jax.configs": "configs"},
)
