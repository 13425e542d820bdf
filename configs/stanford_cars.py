"""SYNC on Stanford Cars with ResNet-34, the field's network, schedule and augmentation.

    python -m sync_jax.main --mode=prepare --config=configs/stanford_cars.py --config.data.source=D
    python -m sync_jax.main --config=configs/stanford_cars.py --config.model.dtype=bfloat16

D holds cars_train/, cars_test/ and the devkit's .mat files; README says where they can be had.
2 GB of pictures, as much for the records, and 3.2 GB for 256-pixel squares; 1.4 GB of device memory
for the training squares, and some 14 GB for the step.

Expected, by arithmetic alone: 300 epochs of 7,330 images at 22 GFLOP each are 4.8e16 FLOP, three
minutes at 300 TFLOP/s, what a third of an H100's bfloat16 is; on two CPU cores (60 GFLOP/s) nine
days.

Unverified: never run on the data, and no result of the field was reproduced. From random weights,
as in the field; --config.model.pretrained=FILE begins with ImageNet's, which 37 pictures a class
would profit from. Crops on the device are of 256-pixel squares, those on the host of whole
pictures. The tenth of the training images held out for calibration is ours.
"""

from ml_collections import ConfigDict

from sync_jax.config import default_config


def get_config() -> ConfigDict:
    """SGD at 0.1, halved every 25 of 300 epochs, without Nesterov or warm-up."""
    config = default_config()
    config.data.name = "stanford_cars"
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
    config.train.epochs = 300.0
    config.log.calibration_every_epochs = 5.0
    config.checkpoint.every_epochs = 10.0
    config.evaluation.batch_size = 256
    return config
