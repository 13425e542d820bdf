"""The declaration of a backbone: how it is built from its options."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
from ml_collections import ConfigDict

from sync_jax.options import Option

WIDTH, FEATURES = "[1, 1024]", "[1, 65536]"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network that maps images or features to the feature vector that the heads see.

    `build` makes the module from the `model` section of a config, with every option in it. The
    module maps `[batch, ...]`, normalised, to `[batch, units]`. With the keyword `train`, BatchNorm
    uses, and updates by, the batch's statistics, and units drop.
    """

    build: Callable[[ConfigDict], nn.Module]
    options: Mapping[str, Option]  # by name; the fields `config.model.NAME`
    images_only: bool = True  # False if it can take feature vectors `[batch, d]`
    has_weights: bool = False  # True if torchvision publishes weights for it; see `pretrained`
