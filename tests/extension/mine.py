"""A method, a score and a backbone of a user's own, outside of sync_jax."""

import flax.linen as nn
import jax.numpy as jnp

from sync_jax import losses
from sync_jax.methods import Method
from sync_jax.models.backbone import Backbone
from sync_jax.options import Option
from sync_jax.scores import Score


def _objective(outputs, labels, mask, config):
    """Cross-entropy with a bonus for a confidence below a ceiling."""
    loss, terms = losses.cross_entropy_loss(outputs["logits"], labels, mask=mask)
    largest = jnp.max(outputs["logits"], axis=-1)
    excess = losses.masked_mean(jnp.maximum(0.0, largest - config.loss.ceiling), mask)
    return loss + config.loss.strength * excess, terms | {"excess": excess}


METHOD = Method(
    heads=(),
    objective=_objective,
    score="tests.extension.mine:SCORE",
    hyperparameters={
        "ceiling": Option(5.0, "(0, inf)", "logit above which confidence costs"),
        "strength": Option(0.1, "[0, 1]"),
    },
)


def _range(outputs, *, power):
    logits = outputs["logits"]
    return (logits.max(axis=-1) - logits.min(axis=-1)) ** power


SCORE = Score(_range, "range", choices=({"power": 1}, {"power": 2}))


class Flat(nn.Module):
    units: int

    @nn.compact
    def __call__(self, images, *, train):
        return nn.relu(nn.Dense(self.units)(images.reshape(images.shape[0], -1)))


BACKBONE = Backbone(
    build=lambda config: Flat(config.units), options={"units": Option(8, "[1, 64]")}
)
