"""SYNC on Fashion-MNIST in about a minute and a half on two CPU cores.

make quickstart
python -m sync_jax.main --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """A narrow network, a short schedule and mild augmentation."""
    config = default_config()
    config.data.name = "fashion_mnist"
    # Each halves or more what a short run must learn; a long one gains from more of both.
    config.data.crop_padding = 1
    config.model.width = 16
    config.optimizer.learning_rate = 0.2
    config.optimizer.schedule = "linear"
    config.train.epochs = 7.0
    return config
