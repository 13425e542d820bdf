"""Objectives on arrays: pure functions, logits in, numbers out.

In all of them `logits` and `auxiliary_logits` are unnormalised log-probabilities
`[batch, classes]`, `selection_logits` and `abstention_logits` are `[batch]`, `labels` are class
indices `[batch]`, and `mask` `[batch]` is 1 for real examples and 0 for padding (None: all are
real). All arithmetic is in float32. Means run over the real examples of the whole array: under
`jax.jit` with a sharded batch that is the global batch. A loss is `[batch]` in nats, or, where it
weighs the batch as a whole, a scalar with its terms by name.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import Array

# Keeps the selective risk finite when the selection head rejects every example. It is far below
# the selection weight of one confidently accepted example, so it biases nothing.
EPSILON = 1e-8

Terms = dict[str, Array]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Softmax cross-entropy of each example: `[batch]` float32, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def softmax_response_prior(logits: Array, *, power: float) -> Array:
    """The selective prior: the largest softmax probability to a power, as a constant.

    The softmax response (Geifman & El-Yaniv, 2017) under `stop_gradient`: the selection head learns
    from the classifier's confidence, and the classifier never learns to please the prior. A power
    above 1 stretches the confident end, where most examples crowd. `[batch]` in `(0, 1]`.
    """
    log_response = jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
    return jax.lax.stop_gradient(jnp.exp(power * log_response))


def masked_mean(values: Array, mask: Array | None) -> Array:
    """Mean of `values` `[batch]` over the real examples; 0 when there are none."""
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / jnp.maximum(jnp.sum(mask > 0), 1)


def cross_entropy_loss(
    logits: Array, labels: Array, *, mask: Array | None = None
) -> tuple[Array, Terms]:
    """Mean cross-entropy: the plain classifier that softmax response is applied to."""
    loss = masked_mean(cross_entropy(logits, labels), mask)
    return loss, {"cross_entropy": loss}


def selectivenet_loss(
    logits: Array,
    selection_logits: Array,
    auxiliary_logits: Array,
    labels: Array,
    *,
    target_coverage: float,
    coverage_weight: float = 32.0,
    alpha: float = 0.5,
    mask: Array | None = None,
) -> tuple[Array, Terms]:
    """SelectiveNet (Geifman & El-Yaniv, 2019, equations 3 to 6).

    With g = sigmoid(selection_logits), l the cross-entropy of `logits` and h of `auxiliary_logits`:

        alpha * (sum(g l) / sum(g) + coverage_weight * max(0, target_coverage - mean(g))^2)
        + (1 - alpha) * mean(h)

    The authors' code divides the risk by the batch size instead of by the coverage; this is the
    paper's form. The penalty sets in below `target_coverage`, in `(0, 1]`; `coverage_weight` is its
    lambda.
    """
    weights = jax.nn.sigmoid(selection_logits.astype(jnp.float32))
    return _selective_objective(
        weights,
        cross_entropy(logits, labels),
        cross_entropy(auxiliary_logits, labels),
        target_coverage=target_coverage,
        coverage_weight=coverage_weight,
        alpha=alpha,
        mask=mask,
    )


def sync_loss(
    logits: Array,
    selection_logits: Array,
    auxiliary_logits: Array,
    labels: Array,
    *,
    target_coverage: float,
    coverage_weight: float = 32.0,
    alpha: float = 0.5,
    prior_power: float = 3.0,
    prior_weight: float = 0.0,
    sync_weight: float = 0.5,
    divergence: str = "bce",
    mask: Array | None = None,
) -> tuple[Array, Terms]:
    """SelectiveNet's objective with the softmax response as a selective prior.

    One family that contains every reading of the abstract of "Selective Prior Synchronization via
    SYNC Loss" (arXiv 2602.11316); the paper's own equation is not public. With p the prior
    (`softmax_response_prior`) and g = sigmoid(selection_logits), it is `selectivenet_loss` with g
    replaced by the weight w = g * p^prior_weight, plus

        sync_weight * mean(D(g, p))

    where D is the binary cross-entropy or the squared difference. `prior_weight=0, sync_weight=0`
    is SelectiveNet. `prior_power` is the exponent of the softmax response in p, `divergence` is D,
    'bce' or 'mse'.

    Raises:
        ValueError: unknown divergence.
    """
    selection_logits = selection_logits.astype(jnp.float32)
    selection = jax.nn.sigmoid(selection_logits)
    prior = softmax_response_prior(logits, power=prior_power)
    if divergence == "bce":
        # From logits: sigmoid saturates in float32, its logarithm must not.
        distance = optax.sigmoid_binary_cross_entropy(selection_logits, prior)
    elif divergence == "mse":
        distance = jnp.square(selection - prior)
    else:
        raise ValueError(f"divergence must be 'bce' or 'mse', got {divergence!r}")
    selective, terms = _selective_objective(
        selection * prior**prior_weight,
        cross_entropy(logits, labels),
        cross_entropy(auxiliary_logits, labels),
        target_coverage=target_coverage,
        coverage_weight=coverage_weight,
        alpha=alpha,
        mask=mask,
    )
    synchronisation = masked_mean(distance, mask)
    terms = terms | {"synchronisation": synchronisation}
    return selective + sync_weight * synchronisation, terms


def deep_gamblers_loss(
    logits: Array, abstention_logits: Array, labels: Array, *, payoff: float
) -> Array:
    """Deep Gamblers (Liu et al., 2019, equation 5): the doubling rate of a horse race.

    With p the softmax over the classes and the abstention, y the label and o the payoff,

        -log(p_y + p_abstain / o)

    in log space, where nothing underflows. The authors' code takes the logarithm of the sum of the
    probabilities. The payoff lies above 1, where abstaining is free, and is at most the number of
    classes, where guessing blindly pays as much.
    """
    log_right, log_abstain = _log_right_and_abstain(logits, abstention_logits, labels)
    return -jnp.logaddexp(log_right, log_abstain - math.log(payoff))


def self_adaptive_loss(
    logits: Array, abstention_logits: Array, labels: Array, targets: Array
) -> Array:
    """Self-adaptive training (Huang et al., 2020, equation 5).

    With p the softmax over the classes and the abstention, y the label and t the target,

        -t log p_y - (1 - t) log p_abstain

    `targets` `[batch]` in `[0, 1]` say how far each example's label is believed.
    """
    log_right, log_abstain = _log_right_and_abstain(logits, abstention_logits, labels)
    return -targets * log_right - (1.0 - targets) * log_abstain


def update_targets(targets: Array, logits: Array, labels: Array, *, momentum: float) -> Array:
    """Self-adaptive training's next targets: momentum * t + (1 - momentum) * p_y, as constants.

    p is the softmax over the classes alone. The authors keep a target per class; the loss reads the
    label's only, and so do we. `targets` `[batch]` are 1 before the first visit.
    """
    right = jnp.exp(-cross_entropy(jax.lax.stop_gradient(logits), labels))
    return momentum * targets + (1.0 - momentum) * right


def contrastive_loss(
    features: Array,
    logits: Array,
    labels: Array,
    *,
    correct_keys: Array,
    correct_classes: Array,
    error_keys: Array,
    error_classes: Array,
    temperature: float,
) -> Array:
    """The confidence-aware contrastive term of CCL-SC (Wu et al., 2024).

    With q the features at unit length, SR the softmax response as a constant, y the label, P the
    keys of right predictions of y, N the keys of examples wrongly predicted as y, t the
    temperature:

        SR * mean over p in P of -log(exp(q.p/t) / (exp(q.p/t) + sum over n in N of exp(q.n/t)))

    It is 0 where P is empty, and its gradient is where N is. The authors' code leaves the
    temperature out of the last q.p, and subtracts the largest exponent once too often, which adds
    an attraction to P that the equation does not have.

    `features` are `[batch, units]`, of any length. `correct_keys` `[correct, units]` and
    `error_keys` `[errors, units]` have unit length; their classes, `[correct]` and `[errors]`, are
    those predicted, and -1 for a place that holds no key.
    """
    confidence = softmax_response_prior(logits, power=1.0)
    queries = unit_length(features) / temperature
    positive = labels[:, None] == correct_classes
    negative = labels[:, None] == error_classes
    # Far below every similarity, yet finite: without any negative the gradient is 0, not NaN.
    repulsion = jax.nn.logsumexp(jnp.where(negative, queries @ error_keys.T, -1e9), axis=-1)
    each = jax.nn.softplus(repulsion[:, None] - queries @ correct_keys.T)
    count = jnp.sum(positive, axis=-1)
    mean = jnp.sum(jnp.where(positive, each, 0.0), axis=-1) / jnp.maximum(count, 1)
    return confidence * mean


def unit_length(features: Array) -> Array:
    """Vectors `[..., units]` over their Euclidean length, float32; a zero vector stays zero."""
    features = features.astype(jnp.float32)
    squared = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))


def entropy(logits: Array) -> Array:
    """Entropy of the class probabilities, -sum(p log p): its minimisation is "+EM".

    Feng et al. (2023) describe it so; their code sums p times the raw logits, which depends on a
    shift of them and has no lower bound. In `[0, log(classes)]`, but for rounding.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _log_right_and_abstain(
    logits: Array, abstention_logits: Array, labels: Array
) -> tuple[Array, Array]:
    """Log-probabilities of the label and of the abstention, `[batch]` each."""
    every = jnp.concatenate([logits, abstention_logits[:, None]], axis=-1).astype(jnp.float32)
    log_p = jax.nn.log_softmax(every)
    return jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0], log_p[:, -1]


def _selective_objective(
    weights: Array,
    losses: Array,
    auxiliary_losses: Array,
    *,
    target_coverage: float,
    coverage_weight: float,
    alpha: float,
    mask: Array | None,
) -> tuple[Array, Terms]:
    """Selective risk, coverage penalty and auxiliary loss; all inputs `[batch]`."""
    coverage = masked_mean(weights, mask)
    # Numerator and denominator are both divided by the number of examples: their ratio is unchanged
    # and EPSILON means the same for every batch size.
    risk = masked_mean(weights * losses, mask) / (coverage + EPSILON)
    penalty = jnp.square(jnp.maximum(0.0, target_coverage - coverage))
    auxiliary = masked_mean(auxiliary_losses, mask)
    loss = alpha * (risk + coverage_weight * penalty) + (1.0 - alpha) * auxiliary
    terms = {
        "selective_risk": risk,
        "coverage_penalty": penalty,
        "weight_coverage": coverage,
        "auxiliary_loss": auxiliary,
    }
    return loss, terms
