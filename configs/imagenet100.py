"""SYNC on ImageNet-100 with ResNet-34, the field's network, schedule and augmentation.

    python -m sync_jax.main --config=configs/imagenet100.py --mode=prepare --config.data.source=DIR
    python -m sync_jax.main --config=configs/imagenet100.py --config.model.dtype=bfloat16

DIR holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or train/<wnid>/ and val/. Of the
138 + 6 GB the 100 classes' 14 GB are read and kept, and 26 GB of 256-pixel squares made of them,
once. 24 GB of device memory for the training squares (or sharded over several devices), and some
8 GB for the step; with --config.data.placement=disk the squares are read for each batch, and with
=host none are made, and the pictures are decoded for each batch.

Expected, by arithmetic alone: 500 epochs of 121,689 images at 22 GFLOP each are 1.3e18 FLOP, 75
minutes at 300 TFLOP/s, what a third of an H100's bfloat16 is. On the host 16 cores at 760 pictures
a second each, which a core of an AMD EPYC reaches with made-up JPEGs of 500 x 375, take 84 minutes;
decoding all once at that rate, 3 minutes of one core for the records and as much for the squares.

Unverified: never run on the data, and no result of the field was reproduced. Colours are jittered
in a fixed order; crops on the device are of 256-pixel squares, those on the host of whole
pictures. The 5,000 calibration images, held out of the 126,689 for training, are ours.
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """SGD at 0.1, halved every 25 of 500 epochs, without Nesterov or warm-up."""
    config = default_config()
    config.data.name = "imagenet100"
    config.data.calibration_size = 5000
    config.data.image_size = 224
    config.data.short_side = 256
    config.data.crop_padding = 0
    config.data.min_crop_area = 0.08
    config.data.jitter = 0.4
    config.model.name = "resnet34"
    config.model.stem = "imagenet"
    config.optimizer.nesterov = False
    config.optimizer.schedule = "step"
    config.optimizer.warmup_epochs = 0.0
    config.train.batch_size = 64
    config.train.epochs = 500.0
    config.log.calibration_every_epochs = 5.0
    config.checkpoint.every_epochs = 5.0
    config.evaluation.batch_size = 256
    return config
