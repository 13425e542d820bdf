"""Backbones and heads in flax.linen."""

from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from sync_jax.config import FIELDS
from sync_jax.errors import InputError, suggestion
from sync_jax.models import cnn, mlp, resnet, vgg
from sync_jax.models.backbone import Backbone
from sync_jax.models.heads import SelectiveNetwork
from sync_jax.options import find

BACKBONES: dict[str, Backbone] = {
    "cnn": cnn.BACKBONE,
    "mlp": mlp.BACKBONE,
    "vgg16_bn": vgg.BACKBONE,
    **resnet.BACKBONES,
}

AUTO = "auto"  # `trainer.choose_network` replaces it by one of these, when the devices are known
ON_CPU, ON_ACCELERATOR = "cnn", "resnet18"


def find_backbone(name: str) -> Backbone:
    """Returns the backbone of a config's `model.name`, or raises an InputError."""
    return find(name, BACKBONES, Backbone, "config.model.name")


def candidates(section: ConfigDict) -> tuple[str, ...]:
    """The backbones that `name` in the `model` section of a config can resolve to."""
    if section.name != AUTO:
        return (section.name,)
    return (ON_ACCELERATOR,) if section.pretrained else (ON_CPU, ON_ACCELERATOR)


def complete(section: ConfigDict) -> list[str]:
    """Adds the backbone's options to the `model` section of a config, and checks them.

    Options of other backbones, which a config file may have set, are removed; returns a line each.
    The name "auto" stays, and its candidates are checked.
    """
    if section.name == AUTO:
        for name in candidates(section):
            complete(ConfigDict({**section, "name": name}))
        return []
    options = find_backbone(section.name).options
    others = {option for backbone in BACKBONES.values() for option in backbone.options}
    left_out = []
    for name in [x for x in section if f"model.{x}" not in FIELDS and x not in options]:
        if name not in others:
            raise InputError(
                f"config.model.{name}: {section.name} has no option {name!r}"
                f"{suggestion(name, options)}; choose from {', '.join(sorted(options))}"
            )
        left_out.append(f"config.model.{name} is no option of {section.name}, and is left out")
        del section[name]
    for name, option in options.items():
        if name not in section:
            section[name] = option.default
        option.check(f"config.model.{name}", section[name])
    if section.pretrained and not find_backbone(section.name).has_weights:
        raise InputError(
            f"config.model.pretrained={section.pretrained!r}: torchvision has no weights for "
            f"{section.name}"
        )
    return left_out


def make_backbone(section: ConfigDict) -> nn.Module:
    """Builds the backbone of a config's `model` section; missing options have their defaults."""
    section = section.copy_and_resolve_references()
    complete(section)
    return find_backbone(section.name).build(section)


def make_network(
    section: ConfigDict,
    *,
    heads: tuple[str, ...],
    num_classes: int,
    target_coverage: float,
    dropout: float = 0.5,
    dropout_samples: int = 100,
    **of_selection: Any,
) -> SelectiveNetwork:
    """Builds a config's backbone with heads; dropout is for the head 'dropout' alone.

    `of_selection` are `detach_features` and `logit_prior` of a `SelectiveNetwork`.
    """
    backbone = make_backbone(section)
    if "dropout" not in heads:
        dropout, dropout_samples = 0.0, 0
    elif hasattr(backbone, "last_dropout"):
        backbone = backbone.clone(last_dropout=0.0)  # the class head's own takes its place
    return SelectiveNetwork(
        backbone, num_classes, heads, target_coverage, dropout, dropout_samples, **of_selection
    )
