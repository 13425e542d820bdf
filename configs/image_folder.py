"""SYNC on your own pictures, one folder of them per class.

    python -m sync_jax.main --config=configs/image_folder.py --config.data.folder=FOLDER

FOLDER/<class>/<picture>, or FOLDER/train/<class>/... and FOLDER/test/<class>/.... A folder
calibration, or val beside train and test, is the calibration split; otherwise a tenth of the
training pictures is held out for it. Certificates want some hundreds. docs/pictures.md lists the
layouts; folders that look like splits and are called otherwise are refused.

The pictures are copied once (those with a short side of more than 512 pixels reduced to that) and
made squares of 64 pixels (--config.data.image_size=128 for finer ones), which takes 12 KB each on
disk and in the device's memory: 10,000 pictures, 125 MB.

The network is ResNet-18 with an accelerator and the cnn without one, and a run stays with what it
began with; --config.model.name decides otherwise.

Expected, by arithmetic alone: 30 epochs of 10,000 pictures of 64 pixels with ResNet-18 are 4e15
FLOP, a minute on a GPU at 100 TFLOP/s; with the cnn 7.5e13, half an hour on two CPU cores at 45
GFLOP/s, and a quarter of that with --config.data.image_size=32. A training says after ten steps how
long it will take. What is unverified: the defaults, which were tuned for nothing.
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """Random resized crops and colours, for any pictures."""
    config = default_config()
    config.data.name = "image_folder"
    config.data.calibration_size = 0  # a tenth, or the calibration folder
    config.data.crop_padding = 0
    config.data.min_crop_area = 0.25
    config.data.jitter = 0.2
    config.model.name = "auto"
    config.train.batch_size = 64
    return config
