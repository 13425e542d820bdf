"""SYNC on SVHN with VGG16-BN, the field's network, schedule and augmentation.

    python -m sync_jax.main --config=configs/svhn.py

Needs train_32x32.mat and test_32x32.mat; without --config.data.source=FOLDER they are fetched from
their authors. 0.25 GB on disk for the files and 0.3 GB prepared; 0.3 GB of device memory for the
images, and some 2 GB for the step.

Expected, by arithmetic alone: 300 epochs of 67,257 images at 1.9 GFLOP each are 3.8e16 FLOP, 130 s
at 300 TFLOP/s, what a third of an H100's bfloat16 is; on two CPU cores (60 GFLOP/s) a week.

Unverified: never run on the data, and no result of the field was reproduced. The rotation takes the
nearest pixel. The 6,000 calibration images, held out of the 73,257 for training, are ours.
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config
from sync_jax.configs import cifar10


def get_config() -> ConfigDict:
    """As configs/cifar10.py, but for the calibration split and the augmentation."""
    config = cifar10.get_config()
    config.data.name = "svhn"
    config.data.calibration_size = default_config().data.calibration_size
    config.data.flip = False  # digits
    config.data.rotation = 15.0
    return config
