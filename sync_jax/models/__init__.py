"""Backbones and heads in flax.linen."""

from collections.abc import Callable

import flax.linen as nn
from ml_collections import ConfigDict

from sync_jax.models.cnn import CNN
from sync_jax.models.heads import SelectiveClassifier
from sync_jax.models.resnet import RESNETS, ResNet
from sync_jax.models.vgg import VGG16


def _cnn(config: ConfigDict) -> CNN:
    return CNN(width=config.width or 32, features=config.features or 256, dtype=config.dtype)


def _vgg16_bn(config: ConfigDict) -> VGG16:
    return VGG16(
        width=config.width or 64,
        features=config.features or 512,
        channel_dropout=config.channel_dropout,
        norm_first=config.norm_first,
        dtype=config.dtype,
    )


def _resnet(config: ConfigDict) -> ResNet:
    stages, bottleneck = RESNETS[config.name]
    return ResNet(stages, bottleneck, config.width or 64, stem=config.stem, dtype=config.dtype)


# A backbone from the `model` section of a config.
BACKBONES: dict[str, Callable[[ConfigDict], nn.Module]] = {
    "cnn": _cnn,
    "vgg16_bn": _vgg16_bn,
    **dict.fromkeys(RESNETS, _resnet),
}


def make_network(
    config: ConfigDict, *, heads: tuple[str, ...], num_classes: int, target_coverage: float
) -> SelectiveClassifier:
    """The network of a config: its backbone and a method's heads.

    Args:
        config: `model` section: name, the backbone's fields, dropout and dropout_samples.
        heads: see `SelectiveClassifier`; with 'dropout' among them, the class head has it.
        num_classes: likewise.
        target_coverage: likewise.
    """
    backbone = BACKBONES[config.name](config)
    drops = "dropout" in heads
    if drops and isinstance(backbone, VGG16):
        backbone = backbone.clone(last_dropout=0.0)  # the class head's own takes its place
    return SelectiveClassifier(
        backbone=backbone,
        num_classes=num_classes,
        heads=heads,
        target_coverage=target_coverage,
        dropout=config.dropout if drops else 0.0,
        dropout_samples=config.dropout_samples if drops else 0,
    )
