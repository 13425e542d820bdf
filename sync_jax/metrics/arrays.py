"""Checks and arithmetic of single arrays."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def real(value: ArrayLike, name: str) -> FloatArray:
    """The argument `name` in float64."""
    try:
        array = np.asarray(value)
        # NumPy would read strings as numbers, and drop an imaginary part but for a warning.
        if array.dtype.kind not in "cSUMm":
            return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of real numbers") from error
    raise ValueError(f"{name} must be an array of real numbers, not of {array.dtype}")


def vector(value: ArrayLike, name: str) -> FloatArray:
    """The argument `name` in float64: [n], not empty, without NaN."""
    array = real(value, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if np.isnan(array).any():
        raise ValueError(f"{name} contains NaN")
    return array + 0.0  # -0.0 becomes 0.0: they tie, and must not differ in the output


def is_binary(array: FloatArray) -> bool:
    """Whether it holds only 0 and 1."""
    return bool(((array == 0) | (array == 1)).all())


def ratio(numerator: Any, denominator: Any) -> FloatArray:
    """Quotient, NaN where the denominator is 0."""
    result = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.asarray(denominator) != 0)


def ceiling(value: FloatArray) -> IntArray:
    """Ceiling that forgives rounding: 0.07 * 100 is 7.000000000000001 and means 7."""
    nearest = np.rint(value)
    close = np.abs(value - nearest) <= 1e-9 * np.maximum(1.0, np.abs(nearest))
    return np.where(close, nearest, np.ceil(value)).astype(np.int64)


def rank_of_coverage(coverage: ArrayLike, n: int) -> IntArray:
    """How many of n examples a coverage in (0, 1] accepts: the smallest k with k/n >= coverage."""
    values = real(coverage, "coverage")
    if not ((values > 0) & (values <= 1)).all():  # NaN fails both comparisons
        raise ValueError(f"coverage must lie in (0, 1], got {values}")
    return np.clip(ceiling(values * n), 1, n)
