"""Backbones and heads in flax.linen."""

from ml_collections import ConfigDict

from sync_jax.models.cnn import CNN
from sync_jax.models.heads import SelectiveClassifier

BACKBONES = {"cnn": CNN}


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
    backbone = BACKBONES[config.name](width=config.width, features=config.features)
    drops = "dropout" in heads
    return SelectiveClassifier(
        backbone=backbone,
        num_classes=num_classes,
        heads=heads,
        target_coverage=target_coverage,
        dropout=config.dropout if drops else 0.0,
        dropout_samples=config.dropout_samples if drops else 0,
    )
