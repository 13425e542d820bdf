"""SYNC on Fashion-MNIST.

    python -m sync_jax.main --config=configs/fashion_mnist.py
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """The defaults, for longer and with a wider network than the quickstart."""
    config = default_config()
    config.data.name = "fashion_mnist"
    return config
