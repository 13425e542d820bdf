"""The binomial tail, from both sides: a bound from a count, and a count from a bound."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincc, betainccinv


def clopper_pearson_upper(errors: ArrayLike, n: ArrayLike, delta: ArrayLike) -> Any:
    """Upper confidence bound for an error rate (Clopper & Pearson 1934).

    The largest rate r with P(Binomial(n, r) <= errors) >= delta, so that a rate estimated from n
    independent examples exceeds it with probability at most delta; 1 where all n are errors. The
    arguments broadcast, to a float or an array; `errors` and `n` must be integers, as a rate times
    n may truncate.
    """
    k, m, d = np.broadcast_arrays(errors, n, np.asarray(delta, dtype=np.float64))
    for counts, name in ((k, "errors"), (m, "n")):
        if not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got {counts.dtype}")
    if (m < 0).any():
        raise ValueError("n must be non-negative")
    if ((k < 0) | (k > m)).any():
        raise ValueError("errors must lie in [0, n]")
    if not ((d > 0) & (d < 1)).all():
        raise ValueError(f"delta must lie in (0, 1), got {delta!r}")
    # beta.ppf(1 - delta, ...) without the cancellation in 1 - delta.
    bound = np.where(k < m, betainccinv(k + 1.0, np.maximum(m - k, 1.0), d), 1.0)
    return float(bound) if bound.ndim == 0 else bound


def at_most(errors: ArrayLike, n: ArrayLike, rate: float) -> Any:
    """P(Binomial(n, rate) <= errors), for errors from -1 up; SciPy's bdtr takes n in 32 bits."""
    k, m = np.asarray(errors, dtype=np.float64), np.asarray(n, dtype=np.float64)
    tail = betaincc(np.maximum(k, 0) + 1, np.maximum(m - k, 1), rate)
    return np.where(k < 0, 0.0, np.where(k >= m, 1.0, tail))


def first_integer(holds: Callable[[int], Any], low: int, high: int) -> int:
    """The smallest integer above `low` from which on `holds`, by doubling `high` and bisection."""
    while not holds(high):
        low, high = high, 2 * high or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@functools.lru_cache
def fewest_accepted(target_risk: float, delta: float, errors: int = 0) -> int:
    """The smallest n with P(Binomial(n, target_risk) <= errors) <= delta: errors it can afford.

    Without an error that is (1 - target_risk)^n <= delta. ValueError if there is none up to 10^300.
    """

    def enough(n: int) -> Any:
        if n > 1e300:  # next to it float64 ends
            raise ValueError(f"target_risk={target_risk:g} is too small for any number of examples")
        return at_most(errors, n, target_risk) <= delta

    return first_integer(enough, errors, errors + 1)


def most_errors(n: ArrayLike, target_risk: float, delta: float) -> Any:
    """The largest k with P(Binomial(n, target_risk) <= k) <= delta; -1 where there is none.

    Inverse of `fewest_accepted`: with k errors the Clopper-Pearson bound still meets the target.
    """

    def of_one(size: int) -> int:
        return first_integer(lambda k: at_most(k, size, target_risk) > delta, -1, size) - 1

    sizes = np.asarray(n, dtype=np.int64)
    if sizes.ndim == 0:
        return of_one(int(sizes))
    # The fewest examples that afford each number of errors: of these numbers there are about
    # target_risk times as many as of sizes.
    first, last = int(sizes.min()), int(sizes.max())
    least = of_one(first)
    errors = np.arange(least + 1, of_one(last) + 1)
    low, high = np.full(errors.shape, first), np.full(errors.shape, last)  # too few, and enough
    while (high - low > 1).any():
        middle = (low + high) // 2
        enough = at_most(errors, middle, target_risk) <= delta
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    # More errors take more examples, but for rounding.
    return least + np.searchsorted(np.maximum.accumulate(high), sizes, side="right")
