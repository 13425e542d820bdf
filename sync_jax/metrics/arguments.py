"""Arguments that are easily exchanged: a loss, and correctness."""

import contextlib
import contextvars
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np

from sync_jax.metrics.sample import is_binary

NAMES = ("loss", "correct")
MOST_RANKED = 10_000  # examples whose ranking is looked at for an exchange of loss and correct

_unchecked = contextvars.ContextVar("unchecked", default=False)
F = TypeVar("F", bound=Callable[..., Any])


@contextlib.contextmanager
def unchecked() -> Iterator[bool]:
    """Turns off the warning that confidence ranks errors first, as a `with` or as a decorator.

    It yields whether the warning was off already.
    """
    inside, token = _unchecked.get(), _unchecked.set(True)
    try:
        yield inside
    finally:
        _unchecked.reset(token)


def by_keyword(function: F) -> F:
    """Deprecates `loss` and `correct` by position, and warns where they seem to be exchanged.

    What follows them in the signature is deprecated by position too. A function whose first
    argument isn't `confidence` does not check the ranking itself.
    """
    names = list(inspect.signature(function).parameters)
    values = next(name for name in names if name.startswith(NAMES))
    first = names.index(values)

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        if len(args) > first:
            keywords = ", ".join(f"{name}=" for name in names[first : len(args)])
            warnings.warn(
                f"{function.__name__} without {keywords} is deprecated: pass it by keyword, as a "
                "loss and correctness by position are easily exchanged",
                DeprecationWarning,
                stacklevel=2,
            )
        if names[0] != "confidence":
            return function(*args, **options)
        with unchecked() as inside:
            result = function(*args, **options)
        if not inside:
            given = dict(zip(names, args, strict=False)) | options
            ranked = ranks_errors_first(given["confidence"], given[values], values)
            if ranked is not None:
                warnings.warn(
                    f"the confidence ranks errors first (failure AUROC {ranked:.2f}): is it a "
                    f"loss, or correctness, that was passed as {values}=? Is confidence an "
                    "uncertainty?",
                    stacklevel=2,
                )
        return result

    return cast(F, checked)


def ranks_errors_first(confidence: Any, value: Any, name: str) -> float | None:
    """The failure AUROC of a 0/1 `loss` or `correct`, if it is below 0.4 and not by chance.

    Five standard deviations of a random ranking, and so never with fewer than nine of both kinds.
    """
    step = -(-np.size(value) // MOST_RANKED)
    score, binary = np.asarray(confidence)[::step], np.asarray(value)[::step].astype(np.float64)
    if not is_binary(binary):
        return None
    wrong = binary == (1 if name == "loss" else 0)
    n_wrong, n_right = np.count_nonzero(wrong), np.count_nonzero(~wrong)
    if min(n_wrong, n_right) < 9:
        return None
    ordered = np.sort(score[wrong])
    wins = (np.searchsorted(ordered, score[~wrong], side) for side in ("left", "right"))
    auroc = float(sum(each.mean() for each in wins)) / 2 / n_wrong
    deviation = math.sqrt((n_wrong + n_right + 1) / (12 * n_wrong * n_right))
    return auroc if auroc < min(0.4, 0.5 - 5 * deviation) else None
