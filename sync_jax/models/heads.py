"""The heads of a selective classifier on top of any backbone."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from sync_jax.losses import entropy
from sync_jax.scores import log_odds

# The features enter the selection logit divided by this, as in SelectiveNet's code: otherwise the
# coverage penalty's first, large gradients blow up the shared features and g saturates at 1.
SELECTION_SCALE = 10.0


class SelectiveNetwork(nn.Module):
    """A backbone with a class head and, as the method asks, selection, auxiliary, abstention heads.

    `heads` may also name 'features': they are then among the outputs of training.
    """

    backbone: nn.Module  # see `Backbone.build`
    num_classes: int
    heads: tuple[str, ...] = ()
    target_coverage: float = 1.0  # in (0, 1]; where the selection function starts
    dropout: float = 0.0  # rate on the features of the class head, for MC-dropout
    dropout_samples: int = 0  # class probabilities averaged over in evaluation; 0: none
    detach_features: bool = False  # the selection head's gradient ends at the features
    logit_prior: str = "none"  # of the selection head

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> dict[str, Array]:
        """Maps what the backbone takes to float32 outputs, by name.

        They are logits and auxiliary_logits `[batch, classes]`, selection_logits and
        abstention_logits `[batch]`. With dropout samples, in evaluation, logits are the logarithms
        of the mean probabilities, and expected_entropy `[batch]` is the mean of the samples'
        entropies (nats).
        """
        features = self.backbone(images, train=train).astype(jnp.float32)
        class_head = nn.Dense(self.num_classes, name="class_head")
        if self.dropout_samples and not train:
            outputs = self._sampled(class_head, features)
        else:
            kept = nn.Dropout(self.dropout, deterministic=not train)(features)
            outputs = {"logits": class_head(kept)}
        if "selection" in self.heads:
            selection = SelectionHead(self.target_coverage, self.logit_prior, name="selection_head")
            seen = jax.lax.stop_gradient(features) if self.detach_features else features
            outputs["selection_logits"] = selection(seen, outputs["logits"], train=train)
        if "auxiliary" in self.heads:
            auxiliary = nn.Dense(self.num_classes, name="auxiliary_head")
            outputs["auxiliary_logits"] = auxiliary(features)
        if "abstention" in self.heads:
            abstention = nn.Dense(1, name="abstention_head")
            outputs["abstention_logits"] = abstention(features)[:, 0]
        if "features" in self.heads and train:
            outputs["features"] = features
        return outputs

    def _sampled(self, class_head: nn.Dense, features: Array) -> dict[str, Array]:
        """Averages probabilities and entropy over dropout samples.

        A sample drops the same features of every example, so the result depends neither on the
        batch size nor on the devices, and the backbone runs once.
        """
        keep = 1.0 - self.dropout
        shape = (self.dropout_samples, features.shape[-1])
        masks = jax.random.bernoulli(jax.random.key(0), keep, shape) / keep
        log_p = jax.nn.log_softmax(class_head(features * masks[:, None, :]))
        return {
            "logits": jax.nn.logsumexp(log_p, axis=0) - math.log(self.dropout_samples),
            "expected_entropy": jnp.mean(entropy(log_p), axis=0),
        }


class SelectionHead(nn.Module):
    """SelectiveNet's selection function before its sigmoid (Geifman & El-Yaniv, 2019).

    Dense 512, ReLU, BatchNorm, division by 10, Dense 1. The last bias starts at the logit of the
    target coverage, so that training begins with the coverage that it is to end with.

    With a `logit_prior` the log odds of the softmax response are added, as a constant: the head
    learns the evidence that makes a posterior of this prior. 'fixed' adds them once, 'learnt' times
    a parameter that starts at 1. The last layer starts at 0, so that g begins as the softmax
    response.
    """

    target_coverage: float
    logit_prior: str = "none"  # or 'fixed' or 'learnt'

    @nn.compact
    def __call__(self, features: Array, logits: Array, *, train: bool) -> Array:
        """Maps features `[batch, units]` and class logits to selection logits `[batch]`."""
        # A coverage of exactly 1 has an infinite logit; g starts at 0.999 then.
        start = min(self.target_coverage, 0.999)
        x = nn.relu(nn.Dense(512)(features))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x /= SELECTION_SCALE
        if self.logit_prior == "none":
            bias_init = nn.initializers.constant(math.log(start / (1.0 - start)))
            return nn.Dense(1, bias_init=bias_init)(x)[:, 0]
        learnt = self.logit_prior == "learnt"
        strength = self.param("prior_strength", nn.initializers.ones, ()) if learnt else 1.0
        evidence = nn.Dense(1, kernel_init=nn.initializers.zeros)(x)[:, 0]
        return evidence + strength * log_odds({"logits": jax.lax.stop_gradient(logits)})
