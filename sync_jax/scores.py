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


SCORES: dict[str, Callable[[Outputs], Any]] = {
    "softmax_response": softmax_response,
    "selection": selection,
}
REQUIRED_OUTPUT = {"softmax_response": "logits", "selection": "selection_logits"}
