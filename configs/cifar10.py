"""SYNC on CIFAR-10 with VGG16-BN, the field's network, schedule and augmentation.

    python -m sync_jax.main --config=configs/cifar10.py

Needs cifar-10-binary.tar.gz or cifar-10-python.tar.gz; without --config.data.source=FOLDER it is
fetched from its authors. 0.2 GB on disk for the archive and as much prepared; 0.2 GB of device
memory for the images, and some 2 GB for the step.

Expected, by arithmetic alone: 300 epochs of 45,000 images at 1.9 GFLOP each are 2.6e16 FLOP, 90 s
at 300 TFLOP/s, what a third of an H100's bfloat16 is; on two CPU cores (60 GFLOP/s) five days.

Unverified: never run on the data, and no result of the field was reproduced. Networks, schedule,
normalisation and augmentation are those of the codes of Deep Gamblers, self-adaptive training and
Feng et al.; the 5,000 calibration images, held out of the 50,000 for training, are ours: those
codes train on all and take thresholds from the test scores.
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """SGD at 0.1, halved every 25 of 300 epochs, without Nesterov or warm-up."""
    config = default_config()
    config.data.name = "cifar10"
    config.data.calibration_size = 5000
    config.data.crop_padding = 4
    config.model.name = "vgg16_bn"
    config.optimizer.nesterov = False
    config.optimizer.schedule = "step"
    config.optimizer.warmup_epochs = 0.0
    config.train.epochs = 300.0
    config.log.calibration_every_epochs = 5.0
    config.checkpoint.every_epochs = 10.0
    return config
