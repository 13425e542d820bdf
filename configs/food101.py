"""SYNC on Food-101 with ResNet-34, the field's network, schedule and augmentation.

    python -m sync_jax.main --config=configs/food101.py --mode=prepare --config.data.source=DIR
    python -m sync_jax.main --config=configs/food101.py --config.model.dtype=bfloat16

DIR holds food-101.tar.gz, or the folder food-101 that it unpacks to. 5 GB for the archive, 5 GB
while it is read, 5 GB for the records, 20 GB for 256-pixel squares; 13 GB of device memory for the
training squares (or sharded over several devices), and some 14 GB for the step; with
--config.data.placement=host no squares are made.

Expected, by arithmetic alone: 500 epochs of 68,175 images at 22 GFLOP each are 7.5e17 FLOP, 42
minutes at 300 TFLOP/s, what a third of an H100's bfloat16 is.

Unverified: never run on the data, and no result of the field was reproduced. Crops on the device
are of 256-pixel squares, those on the host of whole pictures. The tenth of the training images held
out for calibration is ours.
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """SGD at 0.1, halved every 25 of 500 epochs, without Nesterov or warm-up; augments as Cars."""
    config = default_config()
    config.data.name = "food101"
    config.data.calibration_size = 0  # a tenth
    config.data.image_size = 224
    config.data.short_side = 256
    config.data.crop_padding = 0
    config.data.min_crop_area = 0.08
    config.data.rotation = 35.0
    config.data.sharpen = 0.5
    config.data.grey = 0.5
    config.data.perspective = 0.5
    config.data.posterise = 0.5
    config.model.name = "resnet34"
    config.model.stem = "imagenet"
    config.optimizer.nesterov = False
    config.optimizer.schedule = "step"
    config.optimizer.warmup_epochs = 0.0
    config.train.epochs = 500.0
    config.log.calibration_every_epochs = 5.0
    config.checkpoint.every_epochs = 5.0
    config.evaluation.batch_size = 256
    return config
