"""Confidence scores of a network's outputs: `[n]`, higher means more confident.

They work alike on NumPy and JAX arrays and keep the precision of what they are given. In float32
thousands of softmax responses are exactly 1, and g of a sure selection head is: rank such scores in
float64, and compare a threshold with their `Score.unsaturated` form.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Outputs = Mapping[str, Any]  # name -> array, as the network returns them


def _shifted(logits: Any) -> tuple[Any, Any]:
    """Logits less the largest of each row, and their exponentials: at most 1, none overflows."""
    xp = logits.__array_namespace__()
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted, xp.exp(shifted)


def softmax(logits: Any) -> Any:
    """Probabilities `[n, classes]` of `logits` `[n, classes]`."""
    _, exponentials = _shifted(logits)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def softmax_response(outputs: Outputs) -> Any:
    """The largest softmax probability of `logits` `[n, classes]`: `[n]` in `(0, 1]`.

    Hendrycks & Gimpel (2017); Geifman & El-Yaniv (2017).
    """
    # With the largest logit subtracted, the largest probability is 1 / sum(exp(.)).
    _, exponentials = _shifted(outputs["logits"])
    return 1.0 / exponentials.sum(axis=-1)


def log_odds(outputs: Outputs) -> Any:
    """The largest of `logits` `[n, classes]` less the logsumexp of the others: log(SR / (1 - SR)).

    `[n]`, it ranks as the softmax response does, and stays apart in float32 where that is 1. With a
    single class, infinity: there is nothing to mistake it for.
    """
    logits = outputs["logits"]
    xp = logits.__array_namespace__()
    classes = logits.shape[-1]
    if classes == 1:
        return xp.full_like(logits[..., 0], xp.inf)
    # Less the largest first: what remains near 0 is exact, however large the logits are.
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    largest = xp.arange(classes) == xp.argmax(logits, axis=-1)[..., None]
    return -energy({"logits": xp.where(largest, -xp.inf, shifted)})


def selection(outputs: Outputs) -> Any:
    """The selection function g = sigmoid of `selection_logits` `[n]`: `[n]` in `[0, 1]`.

    Geifman & El-Yaniv (2019), "SelectiveNet".
    """
    logits = outputs["selection_logits"]
    xp = logits.__array_namespace__()
    # Both branches take exp of a non-positive number: no overflow at either end.
    decay = xp.exp(-xp.abs(logits))
    return xp.where(logits >= 0, 1.0, decay) / (1.0 + decay)


def selection_logit(outputs: Outputs) -> Any:
    """The logit of g, `selection_logits` `[n]`: g is 1 in float32 where it exceeds 17."""
    return outputs["selection_logits"]


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
    shifted, exponentials = _shifted(outputs["logits"])
    total = exponentials.sum(axis=-1)
    xp = total.__array_namespace__()
    return (exponentials * shifted).sum(axis=-1) / total - xp.log(total)


def max_logit(outputs: Outputs) -> Any:
    """The largest of `logits` `[n, classes]` (Hendrycks et al., 2022)."""
    logits = outputs["logits"]
    return logits.__array_namespace__().max(logits, axis=-1)


def max_logit_pnorm(outputs: Outputs, *, p: float | None) -> Any:
    """The largest centred logit over the p-norm of the centred logits (Cattelan & Silva, 2024).

    `[n]` in `[0, 1]`, 0 where all logits are equal. p is at least 1; None is the softmax response,
    the paper's fallback.
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
    return -selection({"selection_logits": -log_odds_of_answering(outputs)})


def log_odds_of_answering(outputs: Outputs) -> Any:
    """The logarithm of the odds of any class, `logits`, against abstaining: `[n]`."""
    return energy(outputs) - outputs["abstention_logits"]


def mutual_information(outputs: Outputs) -> Any:
    """Minus the mutual information of class and sampled network: `[n]`, at most 0, in nats.

    The entropy of the mean probabilities, `logits` `[n, classes]`, less the mean entropy of the
    samples, `expected_entropy` `[n]` (Depeweg et al., 2018): what the samples disagree about.
    """
    return outputs["expected_entropy"] + negative_entropy(outputs)


def selection_times_response(outputs: Outputs) -> Any:
    """log(g SR) of the selection function g and the softmax response SR: `[n]`, at most 0.

    A sum of logarithms, which float32 keeps apart where it rounds the product to 1.
    """

    def log_sigmoid(x: Any) -> Any:
        xp = x.__array_namespace__()
        return xp.minimum(x, 0.0) - xp.log1p(xp.exp(-xp.abs(x)))

    return log_sigmoid(outputs["selection_logits"]) + log_sigmoid(log_odds(outputs))


def mean_heads_response(outputs: Outputs) -> Any:
    """The largest mean probability of the class and the auxiliary head: `[n]` in `(0, 1]`."""
    p, q = softmax(outputs["logits"]), softmax(outputs["auxiliary_logits"])
    return (p + q).max(axis=-1) / 2.0


@dataclasses.dataclass(frozen=True)
class Score:
    """A confidence score.

    A score `of_raw_logits` reads their scale or shift. The logarithms of averaged probabilities
    have neither: their energy is 0 for every example. Of the `choices` of arguments the first with
    the least AURC on the calibration split is taken. Thresholds are on its `unsaturated` form, a
    score that ranks as it does and that float32 keeps apart; None: on the score itself.
    """

    function: Callable[..., Any]  # maps outputs, and arguments by keyword, to [n]
    label: str  # in tables and pictures
    needs: tuple[str, ...] = ("logits",)  # the outputs that it reads
    of_raw_logits: bool = False
    choices: tuple[Mapping[str, Any], ...] = ({},)
    unsaturated: "Score | None" = None  # without arguments

    def __post_init__(self) -> None:
        """Raises ValueError without a label: a table could not name its row."""
        if not self.label:
            raise ValueError("a Score needs a label")

    def applies(self, outputs: Outputs) -> bool:
        """True if the score means something for these outputs."""
        averaged = "expected_entropy" in outputs
        return outputs.keys() >= {*self.needs} and not (averaged and self.of_raw_logits)


def deployed_confidence(score: Score, outputs: Outputs, **parameters: Any) -> np.ndarray:
    """Confidence `[n]` float32 as a threshold is compared with it: by the unsaturated form.

    It is computed in float64, and rounded, so that whoever computes in float32 decides alike.
    """
    exact = {name: np.asarray(output).astype(np.float64) for name, output in outputs.items()}
    form = score.unsaturated
    confidence = score.function(exact, **parameters) if form is None else form.function(exact)
    with np.errstate(over="ignore"):  # 1e39 is infinite for them too
        rounded: np.ndarray = confidence.astype(np.float32)
    return rounded


LOG_ODDS = Score(log_odds, "log odds")
_SELECTION_LOGIT = Score(selection_logit, "logit of g", needs=("selection_logits",))
_ABSTAINING = ("logits", "abstention_logits")
_ANSWERING = Score(log_odds_of_answering, "log odds of answering", needs=_ABSTAINING)
SCORES: dict[str, Score] = {
    "softmax_response": Score(softmax_response, "SR", unsaturated=LOG_ODDS),
    "log_odds": LOG_ODDS,
    "margin": Score(margin, "margin"),
    "negative_entropy": Score(negative_entropy, "-entropy"),
    "max_logit": Score(max_logit, "max logit", of_raw_logits=True),
    "max_logit_pnorm": Score(
        max_logit_pnorm,
        "p-norm",
        of_raw_logits=True,
        choices=({"p": None}, *({"p": p} for p in range(1, 11))),
    ),
    "energy": Score(energy, "energy", of_raw_logits=True),
    "selection": Score(selection, "g", ("selection_logits",), unsaturated=_SELECTION_LOGIT),
    "abstention": Score(abstention, "-abstention", _ABSTAINING, unsaturated=_ANSWERING),
    "mutual_information": Score(
        mutual_information, "-mutual information", needs=("logits", "expected_entropy")
    ),
    "selection_times_response": Score(
        selection_times_response, "log(g SR)", needs=("logits", "selection_logits")
    ),
    "mean_heads_response": Score(
        mean_heads_response, "SR of both heads", needs=("logits", "auxiliary_logits")
    ),
}
