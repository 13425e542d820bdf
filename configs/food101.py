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

from sync_jax.configs import stanford_cars


def get_config() -> ConfigDict:
    """As configs/stanford_cars.py, for 500 epochs."""
    config = stanford_cars.get_config()
    config.data.name = "food101"
    config.train.epochs = 500.0
    config.checkpoint.every_epochs = 5.0
    return config
