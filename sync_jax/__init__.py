"""Selective classification in JAX/Flax, with the SYNC loss.

`fit` trains a classifier that abstains, on arrays in memory, and `SelectiveClassifier.load` takes a
trained one. `evaluate_logits` judges predictions of any framework. That, `sync_jax.metrics` and
`sync_jax.guarantees` need no JAX, so it is imported when `fit` is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sync_jax.evaluation.decision import Decision
    from sync_jax.evaluation.given import evaluate_logits
    from sync_jax.predictor import Prediction, SelectiveClassifier, fit

__version__ = "0.1.0"
__all__ = ["Decision", "Prediction", "SelectiveClassifier", "evaluate_logits", "fit"]
_MODULES = {"Decision": "evaluation.decision", "evaluate_logits": "evaluation.given"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = _MODULES.get(name, "predictor")
        return getattr(importlib.import_module(f"sync_jax.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
