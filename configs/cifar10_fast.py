"""SYNC on CIFAR-10 with VGG16-BN in a tenth of the field's epochs, for one GPU.

    python -m sync_jax.main --config=configs/cifar10_fast.py

As configs/cifar10.py, but for bfloat16, four times the batch at four times the rate, Nesterov
momentum, and a rate that rises for two epochs and falls linearly to zero for the others.

Expected, by arithmetic alone: 30 epochs of 45,000 images at 1.9 GFLOP each are 2.6e15 FLOP, 9 s at
300 TFLOP/s, what a third of an H100's bfloat16 is, and compilation before.

Unverified: never run on the data or a GPU, nor shown to reach the selective error of 300 epochs.
`python -m benchmarks.headline` measures both beside each other.
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """30 epochs of batches of 512."""
    config = default_config()
    config.data.name = "cifar10"
    config.data.calibration_size = 5000
    config.data.crop_padding = 4
    config.model.name = "vgg16_bn"
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 0.4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_epochs = 2.0
    config.train.batch_size = 512
    config.train.epochs = 30.0
    config.log.calibration_every_epochs = 10.0
    config.checkpoint.every_epochs = 10.0
    return config
