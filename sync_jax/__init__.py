"""Selective classification in JAX/Flax, with the SYNC loss.

`fit` trains a classifier that abstains, on arrays in memory. `sync_jax.metrics` and
`sync_jax.guarantees` need NumPy and SciPy only, so JAX is imported when `fit` is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sync_jax.predictor import Prediction, SelectiveClassifier, fit

__version__ = "0.1.0"
__all__ = ["Prediction", "SelectiveClassifier", "fit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sync_jax import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
