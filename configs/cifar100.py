"""SYNC on CIFAR-100 with VGG16-BN, the field's network, schedule and augmentation.

    python -m sync_jax.main --config=cifar100

Needs cifar-100-binary.tar.gz or cifar-100-python.tar.gz; without --config.data.source=FOLDER it is
fetched from its authors. All else is as in configs/cifar10.py: memory, arithmetic, and what is
unverified.
"""

from ml_collections import ConfigDict

from sync_jax.configs import cifar10


def get_config() -> ConfigDict:
    """As configs/cifar10.py."""
    config = cifar10.get_config()
    config.data.name = "cifar100"
    return config
