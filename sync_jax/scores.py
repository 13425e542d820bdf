"""Confidence scores of a network's outputs: `[n]`, higher means more confident.

They work alike on NumPy and JAX arrays and keep the precision of what they are given. Give them
float64 where ties matter: in float32 thousands of softmax responses are exactly 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

Outputs = Mapping[str, Any]  # name -> array, as the network returns them


def softmax_response(outputs: Outputs) -> Any:
    """The largest softmax probability of `logits` `[n, classes]`: `[n]` in `(0, 1]`.

    Hendrycks & Gimpel (2017); Geifman & El-Yaniv (2017).
    """
    logits = outputs["logits"]
    xp = logits.__array_namespace__()
    # With the largest logit subtracted, the largest probability is 1 / sum(exp(.)).
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return 1.0 / xp.sum(xp.exp(shifted), axis=-1)


def selection(outputs: Outputs) -> Any:
    """The selection function g = sigmoid of `selection_logits` `[n]`: `[n]` in `[0, 1]`.

    Geifman & El-Yaniv (2019), "SelectiveNet".
    """
    logits = outputs["selection_logits"]
    xp = logits.__array_namespace__()
    # Both branches take exp of a non-positive number: no overflow at either end.
    decay = xp.exp(-xp.abs(logits))
    return xp.where(logits >= 0, 1.0, decay) / (1.0 + decay)


def margin(outputs: Outputs) -> Any:
    """Largest minus second largest softmax probability of `logits` `[n, classes]`: in `[0, 1]`.

    With a single class, 1: there is nothing to mistake it for.
    """
    logits = outputs["logits"]
    xp = logits.__array_namespace__()
    if logits.shape[-1] == 1:
        return xp.ones_like(logits[..., 0])
    two = xp.sort(logits, axis=-1)[..., -2:]
    # p1 - p2 = p1 (1 - p2 / p1), without the cancellation of two probabilities close to 1/2.
    return softmax_response(outputs) * -xp.expm1(two[..., 0] - two[..., 1])


def negative_entropy(outputs: Outputs) -> Any:
    """sum(p log p) of the softmax p of `logits` `[n, classes]`: in `[-log(classes), 0]`, nats."""
    logits = outputs["logits"]
    xp = logits.__array_namespace__()
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    exponentials = xp.exp(shifted)
    total = xp.sum(exponentials, axis=-1)
    return xp.sum(exponentials * shifted, axis=-1) / total - xp.log(total)


def max_logit(outputs: Outputs) -> Any:
    """The largest of `logits` `[n, classes]` (Hendrycks et al., 2022)."""
    logits = outputs["logits"]
    return logits.__array_namespace__().max(logits, axis=-1)


def max_logit_pnorm(outputs: Outputs, *, p: float | None) -> Any:
    """The largest centred logit over the p-norm of the centred logits (Cattelan & Silva, 2024).

    Args:
        outputs: with `logits` `[n, classes]`.
        p: order of the norm, at least 1; None is the softmax response, the paper's fallback. Choose
            it on calibration data: `evaluate.fit_parameters`.

    Returns:
        `[n]`, in `[0, 1]`; 0 where all logits are equal.
    """
    if p is None:
        return softmax_response(outputs)
    logits = outputs["logits"]
    xp = logits.__array_namespace__()
    # Less the largest first: equal logits become zeros, which their rounded mean needn't make them.
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    centred = shifted - xp.mean(shifted, axis=-1, keepdims=True)
    largest = xp.max(xp.abs(centred), axis=-1, keepdims=True)
    # In units of the largest, whose power cannot overflow.
    scaled = centred / xp.where(largest > 0, largest, 1.0)
    norm = xp.sum(xp.abs(scaled) ** p, axis=-1) ** (1.0 / p)
    return xp.max(scaled, axis=-1) / xp.where(norm > 0, norm, 1.0)


def energy(outputs: Outputs) -> Any:
    """log(sum(exp(.))) of `logits` `[n, classes]`, the negative free energy (Liu et al., 2020)."""
    logits = outputs["logits"]
    xp = logits.__array_namespace__()
    largest = xp.max(logits, axis=-1)
    return largest + xp.log(xp.sum(xp.exp(logits - largest[..., None]), axis=-1))


def abstention(outputs: Outputs) -> Any:
    """Minus the probability of abstaining: `[n]` in `[-1, 0]` (Liu et al., 2019, "Deep Gamblers").

    In the softmax over the classes, `logits` `[n, classes]`, and `abstention_logits` `[n]`. Its
    negative rather than its complement, which would be 1 for every small enough probability.
    """
    relative = outputs["abstention_logits"] - energy(outputs)
    return -selection({"selection_logits": relative})


def mutual_information(outputs: Outputs) -> Any:
    """Minus the mutual information of class and sampled network: `[n]`, at most 0, in nats.

    The entropy of the mean probabilities, `logits` `[n, classes]`, less the mean entropy of the
    samples, `expected_entropy` `[n]` (Depeweg et al., 2018): what the samples disagree about.
    """
    return outputs["expected_entropy"] + negative_entropy(outputs)


SCORES: dict[str, Callable[..., Any]] = {
    "softmax_response": softmax_response,
    "margin": margin,
    "negative_entropy": negative_entropy,
    "max_logit": max_logit,
    "max_logit_pnorm": max_logit_pnorm,
    "energy": energy,
    "selection": selection,
    "abstention": abstention,
    "mutual_information": mutual_information,
}
# The outputs that a score needs; of all but `selection` the class logits.
REQUIRED_OUTPUTS = {
    **dict.fromkeys(SCORES, ("logits",)),
    "selection": ("selection_logits",),
    "abstention": ("logits", "abstention_logits"),
    "mutual_information": ("logits", "expected_entropy"),
}
# These read the scale or the shift of raw logits, which the logarithms of averaged probabilities,
# where there is an expected_entropy, don't have: their energy is 0 for every example.
OF_RAW_LOGITS = ("max_logit", "max_logit_pnorm", "energy")


def available(outputs: Outputs) -> list[str]:
    """The names of the scores that mean something for these outputs."""
    averaged = "expected_entropy" in outputs
    return [
        name
        for name, needed in REQUIRED_OUTPUTS.items()
        if outputs.keys() >= {*needed} and not (averaged and name in OF_RAW_LOGITS)
    ]
