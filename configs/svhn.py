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


def get_config() -> ConfigDict:
    """SGD at 0.1, halved every 25 of 300 epochs, without Nesterov or warm-up."""
    config = default_config()
    config.data.name = "svhn"
    config.data.flip = False  # digits
    config.data.rotation = 15.0
    config.data.crop_padding = 4
    config.model.name = "vgg16_bn"
    config.optimizer.nesterov = False
    config.optimizer.schedule = "step"
    config.optimizer.warmup_epochs = 0.0
    config.train.epochs = 300.0
    config.log.calibration_every_epochs = 5.0
    config.checkpoint.every_epochs = 10.0
    return config
