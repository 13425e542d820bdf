"""SYNC on Fashion-MNIST.

python -m sync_jax.main --config=configs/fashion_mnist.py
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """The defaults: a wider network than the quickstart's, trained for longer."""
    config = default_config()
    config.data.name = "fashion_mnist"
    config.train.epochs = 20.0
    return config
