"""Seconds that each metric and certificate takes on a million examples, in one thread.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py

Prints the minimum, median and maximum of five runs after a warm-up. Beside them stands a sort of
the same numbers, which every ranking metric needs: compare machines by the ratio.
"""

import functools
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from sync_jax import guarantees, metrics

N = 1_000_000
CLASSES = 10


def seconds(function: Callable[[], object], runs: int = 5) -> list[float]:
    """Wall-clock seconds of each run, after one that is not counted."""
    function()
    result = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        result.append(time.perf_counter() - start)
    return result


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    confidence = rng.random(N)
    wrong = (rng.random(N) > 0.5 + confidence / 2).astype(np.float64)
    probabilities = rng.dirichlet(np.ones(CLASSES), N)
    labels = rng.integers(0, CLASSES, N)
    ranking = (
        metrics.risk_coverage_curve,
        functools.partial(metrics.selective_risk, coverage=0.8),
        functools.partial(metrics.coverage_at_risk, risk=0.05),
        metrics.aurc,
        metrics.excess_aurc,
        metrics.normalised_aurc,
        metrics.augrc,
        metrics.excess_augrc,
        metrics.threshold_table,
    )
    detection = (
        metrics.failure_auroc,
        metrics.fpr_at_tpr,
        functools.partial(guarantees.sgr, target_risk=0.1, delta=0.05),
        functools.partial(guarantees.sgr_fixed_sequence, target_risk=0.1, delta=0.05),
        functools.partial(guarantees.learn_then_test, target_risk=0.1, delta=0.05),
        functools.partial(guarantees.conformal_risk_control, alpha=0.1),
    )
    probabilistic = (
        metrics.accuracy,
        metrics.negative_log_likelihood,
        metrics.brier,
        metrics.expected_calibration_error,
    )
    cases = {"np.sort": lambda: np.sort(confidence)}
    for functions, arguments in (
        (ranking, {"confidence": confidence, "loss": wrong}),
        (detection, {"confidence": confidence, "correct": 1 - wrong}),
        (probabilistic, {"probabilities": probabilities, "labels": labels}),
    ):
        for function in functions:
            name = getattr(function, "func", function).__name__
            cases[name] = functools.partial(function, **arguments)
    print(f"{N:,} examples, {platform.machine()}, Python {platform.python_version()}")
    print(f"{'':30}{'min':>8}{'median':>8}{'max':>8}")
    for name, case in cases.items():
        taken = seconds(case)
        print(f"{name:30}{min(taken):8.3f}{statistics.median(taken):8.3f}{max(taken):8.3f}")


if __name__ == "__main__":
    main()
