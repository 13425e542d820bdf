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
_LEAST = 1e-30  # of a confidence whose logarithm is taken

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
    logits: Array,
    labels: Array,
    *,
    label_smoothing: float = 0.0,
    logit_norm: float = 0.0,
    mask: Array | None = None,
) -> tuple[Array, Terms]:
    """Mean cross-entropy: the plain classifier that softmax response is applied to.

    Label smoothing (Szegedy et al., 2016) of e has the label's probability 1 - e and each class's
    e / classes as the target. A positive `logit_norm` divides the logits by it and by their
    Euclidean length (Wei et al., 2022, whose temperature it is; 0.04 on CIFAR-10).
    """
    if logit_norm:
        logits = unit_length(logits) / logit_norm
    each = cross_entropy(logits, labels)
    if label_smoothing:
        of_any_class = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
        each = (1.0 - label_smoothing) * each + label_smoothing * of_any_class
    loss = masked_mean(each, mask)
    return loss, {"cross_entropy": loss}


def aurc_loss(logits: Array, labels: Array, *, mask: Array | None = None) -> tuple[Array, Terms]:
    """The batch's AURC with the cross-entropy as the loss (Zhou et al., 2025).

    With n examples, k the rank of the softmax response, 1 for the most confident, and H the
    harmonic numbers, it is mean((H_n - H_(k-1)) l). The weight is a constant; its mean is 1 where
    no two are equal. Zhou et al. train a network by it that cross-entropy has trained.
    """
    rank, count = confidence_ranks(softmax_response_prior(logits, power=1.0), mask)
    digamma = jax.scipy.special.digamma
    weights = digamma(count + 1.0) - digamma(rank)
    loss = masked_mean(weights * cross_entropy(logits, labels), mask)
    return loss, {"aurc_loss": loss}


def confidence_ranks(
    confidence: Array, mask: Array | None, earlier: Array | None = None
) -> tuple[Array, Array]:
    """Ranks `[batch]` among the real examples, 1 for the most confident, and their number.

    Confidences of `earlier` batches `[m]` are ranked among too; NaN stands for none.
    Equal confidences share the mean of their ranks, so that no order of examples matters. As
    constants.
    """
    confidence = jax.lax.stop_gradient(confidence)
    real = jnp.ones_like(confidence) if mask is None else (mask > 0).astype(jnp.float32)
    among = confidence
    if earlier is not None:
        among = jnp.concatenate([confidence, earlier])
        real = jnp.concatenate([real, (~jnp.isnan(earlier)).astype(jnp.float32)])
    above = jnp.sum(real * (among > confidence[:, None]), axis=-1)
    equal = jnp.sum(real * (among == confidence[:, None]), axis=-1)
    return above + (equal + 1.0) / 2.0, jnp.sum(real)


def rank_weights(
    confidence: Array,
    *,
    target_coverage: float | Array,
    earlier: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Weights with which examples enter the mean selective risk over coverages from c to 1.

    Let r be the share of the examples that are at least as confident as an example, l(r) its loss,
    and c the target coverage. The selective risk at coverage t is the integral of l from 0 to t,
    over t. In its mean over t from c to 1, l(r) is weighted by the integral of 1 / ((1 - c) t) from
    max(r, c) to 1:

        w(r) = -log(max(r, c)) / (1 - c)

    Its mean over r is 1. c near 1 gives equal weights, and c near 0 AURC's own, -log r; an array
    `[]` is kept from both ends. In a batch of n the example of rank k has r = (k - 1/2) / n;
    `earlier` as of `confidence_ranks`. `[batch]`, constants.
    """
    if isinstance(target_coverage, float) and target_coverage == 1:
        return jnp.ones(confidence.shape, jnp.float32)
    rank, count = confidence_ranks(confidence, mask, earlier)
    share = jnp.clip((rank - 0.5) / jnp.maximum(count, 1.0), 1e-9, 1.0)
    if isinstance(target_coverage, Array):
        c = jnp.clip(jax.lax.stop_gradient(target_coverage), 0.01, 0.99)
        return jnp.minimum(-jnp.log(share), -jnp.log(c)) / (1.0 - c)
    # The bound in float64: near 1, c and its logarithm would round to nothing.
    return jnp.minimum(-jnp.log(share), -math.log(target_coverage)) / (1.0 - target_coverage)


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
    prior_source: str = "class_head",
    prior_power: float = 3.0,
    prior_weight: float = 0.0,
    risk_weight: str = "selection",
    rank_floor: str = "target",
    sync_target: str = "prior",
    sync_weight: float = 0.5,
    divergence: str = "bce",
    second_logits: Array | None = None,
    average_response: Array | None = None,
    earlier_responses: Array | None = None,
    held_out: Array | None = None,
    mask: Array | None = None,
) -> tuple[Array, Terms]:
    """SelectiveNet's objective with the softmax response as a selective prior.

    One family that contains every reading of the abstract of "Selective Prior Synchronization via
    SYNC Loss" (arXiv 2602.11316); the paper's own equation is not public. With q the response of
    `prior_source` (`log_response`), p = q^prior_power the prior, a constant,
    g = sigmoid(selection_logits), l the cross-entropy of `logits` and h of `auxiliary_logits`:

        alpha * (sum(w l) / sum(w) + coverage_weight * max(0, target_coverage - coverage)^2)
        + (1 - alpha) * mean(h) + sync_weight * mean(D(g, t))

    `risk_weight` is 'selection': w = g * p^prior_weight, coverage = mean(w), 'rank':
    w = `rank_weights` of q * p^prior_weight, whose coverages begin at the target or, with
    `rank_floor` 'error', at the batch's error rate, so that they are equal where the network fits
    nothing and AURC's where it fits all; or 'equal': w = p^prior_weight. In the latter two w is
    a constant and coverage = mean(g), so that with coverage_weight=0 g learns from the
    synchronisation alone. `sync_target` is 'prior': t = p, or 'correctness': t = 1 where the
    largest of `second_logits`, if given, else of `logits` is the label's. `divergence` is D, 'bce'
    or 'mse'. `prior_weight=0, sync_weight=0` is SelectiveNet.

    `second_logits` are those of another augmentation of the same examples; `average_response`
    `[batch]` is the q of 'average'. 'rank' ranks among the `earlier_responses` `[m]` too, q of
    earlier batches, below 0 for none. Examples `held_out` `[batch]` teach g alone, by the
    synchronisation, and the others all but that.

    Raises:
        ValueError: an option is unknown, or an array that it needs is missing.
    """
    selection_logits = selection_logits.astype(jnp.float32)
    selection = jax.nn.sigmoid(selection_logits)
    response = log_response(
        prior_source, logits, auxiliary_logits, labels, second_logits, average_response, mask
    )
    response = jax.lax.stop_gradient(response)
    synchronised = classified = mask
    if held_out is not None:
        real = jnp.ones(labels.shape) if mask is None else mask
        synchronised, classified = jnp.where(held_out, real, 0.0), jnp.where(held_out, 0.0, real)
    prior = jnp.exp(prior_power * response)
    if sync_target == "prior":
        target = prior
    elif sync_target == "correctness":
        judged = logits if second_logits is None else second_logits
        target = (jnp.argmax(judged, axis=-1) == labels).astype(jnp.float32)
    else:
        raise ValueError(f"sync_target must be 'prior' or 'correctness', got {sync_target!r}")
    if divergence == "bce":
        # From logits: sigmoid saturates in float32, its logarithm must not.
        distance = optax.sigmoid_binary_cross_entropy(selection_logits, target)
    elif divergence == "mse":
        distance = jnp.square(selection - target)
    else:
        raise ValueError(f"divergence must be 'bce' or 'mse', got {divergence!r}")
    weights = prior**prior_weight
    if risk_weight == "selection":
        weights = selection * weights
    elif risk_weight == "rank":
        earlier = None if earlier_responses is None else jnp.log(earlier_responses)  # NaN below 0
        floor: float | Array = target_coverage
        if rank_floor == "error":
            wrong = (jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32)
            floor = masked_mean(wrong, classified)
        elif rank_floor != "target":
            raise ValueError(f"rank_floor must be 'target' or 'error', got {rank_floor!r}")
        weights *= rank_weights(response, target_coverage=floor, earlier=earlier, mask=classified)
    elif risk_weight != "equal":
        raise ValueError(f"risk_weight must be 'selection', 'rank' or 'equal', got {risk_weight!r}")
    selective, terms = _selective_objective(
        weights,
        cross_entropy(logits, labels),
        cross_entropy(auxiliary_logits, labels),
        selection=None if risk_weight == "selection" else selection,
        target_coverage=target_coverage,
        coverage_weight=coverage_weight,
        alpha=alpha,
        mask=classified,
    )
    synchronisation = masked_mean(distance, synchronised)
    terms = terms | {"synchronisation": synchronisation}
    return selective + sync_weight * synchronisation, terms


def log_response(
    source: str,
    logits: Array,
    auxiliary_logits: Array,
    labels: Array,
    second_logits: Array | None,
    average_response: Array | None,
    mask: Array | None,
) -> Array:
    """Logarithm of the confidence that a selective prior is made of: `[batch]` float32.

    By `source`: the softmax response of the 'class_head' or the 'auxiliary_head'; the probability
    of the 'true_class' (the target of ConfidNet, Corbière et al., 2019); the 'margin' of the two
    largest; the 'average' over an example's visits, `average_response`; the 'agreement' of two
    augmentations, the probability sum(p p') that classes drawn for each are the same; and as a
    control 'shuffled', the softmax response of the batch's next example.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    largest = jnp.max(log_p, axis=-1)
    if source == "class_head":
        return largest
    if source == "auxiliary_head":
        return jnp.max(jax.nn.log_softmax(auxiliary_logits.astype(jnp.float32)), axis=-1)
    if source == "true_class":
        return -cross_entropy(logits, labels)
    if source == "margin":
        # A class of probability 0 is added: a single one has no second.
        two = jax.lax.top_k(jnp.pad(jnp.exp(log_p), ((0, 0), (0, 1))), 2)[0]
        return jnp.log(jnp.maximum(two[:, 0] - two[:, 1], _LEAST))
    if source == "average" and average_response is not None:
        return jnp.log(jnp.maximum(average_response, _LEAST))
    if source == "agreement" and second_logits is not None:
        other = jax.nn.log_softmax(second_logits.astype(jnp.float32))
        return jax.nn.logsumexp(log_p + other, axis=-1)
    if source == "shuffled":
        # Batches are drawn at random, so that the next example is a random one.
        real = jnp.ones(labels.shape, bool) if mask is None else mask > 0
        order = jnp.argsort(~real, stable=True)
        place = (jnp.cumsum(real) % jnp.maximum(jnp.sum(real), 1)).astype(jnp.int32)
        return largest[order[place]]
    raise ValueError(f"prior_source={source!r} is unknown, or the array that it needs is missing")


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
    selection: Array | None = None,
    target_coverage: float,
    coverage_weight: float,
    alpha: float,
    mask: Array | None,
) -> tuple[Array, Terms]:
    """Selective risk, coverage penalty and auxiliary loss; all inputs `[batch]`.

    The coverage is the mean of `selection`, by default the weights themselves.
    """
    mean_weight = masked_mean(weights, mask)
    coverage = mean_weight if selection is None else masked_mean(selection, mask)
    # Numerator and denominator are both divided by the number of examples: their ratio is unchanged
    # and EPSILON means the same for every batch size.
    risk = masked_mean(weights * losses, mask) / (mean_weight + EPSILON)
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
