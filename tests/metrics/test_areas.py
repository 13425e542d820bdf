"""The areas against hand-computed values, closed forms, oracles and identities."""

import math
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_jax import metrics
from tests.metrics import oracles
from tests.metrics.examples import (
    CONVENTIONS,
    HAND,
    HAND_TIED,
    any_loss,
    example,
    rows,
    split,
    zero_one,
)


def test_aurc_by_hand():
    assert metrics.aurc(*HAND) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert metrics.aurc(*HAND, convention="fd_shifts") == pytest.approx(
        (0 + (0 + 1 / 2) / 2 + (1 / 2 + 1 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 4
    )
    assert metrics.aurc(*HAND, convention="torch_uncertainty") == pytest.approx(
        ((0 + 1 / 2) / 2 + (1 / 2 + 1 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 3
    )


def test_aurc_with_a_tie_by_hand():
    assert metrics.aurc(*HAND_TIED) == pytest.approx((0 + 1 / 4 + 1 / 3 + 1 / 2) / 4)
    # The points of fd_shifts: (1/4, 0), (3/4, 1/3), (1, 1/2), and (0, 0).
    assert metrics.aurc(*HAND_TIED, convention="fd_shifts") == pytest.approx(
        0 + (1 / 2) * (1 / 3) / 2 + (1 / 4) * (1 / 3 + 1 / 2) / 2
    )
    assert metrics.aurc(*HAND_TIED, convention="torch_uncertainty") == pytest.approx(
        ((0 + 1 / 4) / 2 + (1 / 4 + 1 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 3
    )


def test_areas_derived_from_aurc_by_hand():
    best = (0 + 0 + 1 / 3 + 1 / 2) / 4
    area = (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4
    assert metrics.excess_aurc(*HAND) == pytest.approx(area - best)
    assert metrics.normalised_aurc(*HAND) == pytest.approx((area - best) / (1 / 2 - best))
    asymptotic = 1 / 2 + 1 / 2 * math.log(1 / 2)
    assert metrics.excess_aurc(*HAND, convention="fd_shifts") == pytest.approx(
        metrics.aurc(*HAND, convention="fd_shifts") - asymptotic
    )
    # Generalised risks 0, 0, 1/4, 1/4, 1/2 at coverages 0, 1/4, ..., 1.
    assert metrics.augrc(*HAND) == pytest.approx((1 / 8 + 1 / 4 + 3 / 8) / 4)
    assert metrics.excess_augrc(*HAND) == pytest.approx((1 / 8 + 1 / 4 + 3 / 8) / 4 - 1 / 8)


@given(st.integers(0, 60), st.integers(0, 60))
@hypothesis.example(5, 0)
@hypothesis.example(0, 5)
def test_closed_forms_of_perfect_reversed_and_constant(right, wrong):
    n = right + wrong
    hypothesis.assume(n >= 2)  # torch_uncertainty needs two
    error = np.r_[np.zeros(right), np.ones(wrong)]
    perfect, reverse, constant = -np.arange(n), np.arange(n), np.zeros(n)
    r, harmonic = wrong / n, lambda k: sum(Fraction(1, i) for i in range(1, k + 1))
    # Perfect: (k - right)/k for k > right. Reversed: 1 up to k = wrong, then wrong/k.
    best = float((wrong - right * (harmonic(n) - harmonic(right))) / n)
    worst = float((wrong + wrong * (harmonic(n) - harmonic(wrong))) / n)
    assert metrics.aurc(perfect, error) == pytest.approx(best, abs=1e-15)
    assert metrics.aurc(reverse, error) == pytest.approx(worst)
    assert metrics.augrc(perfect, error) == pytest.approx(r**2 / 2)
    assert metrics.augrc(reverse, error) == pytest.approx(r - r**2 / 2)
    assert metrics.augrc(constant, error) == pytest.approx(r / 2)
    for convention in CONVENTIONS:
        assert metrics.aurc(constant, error, convention=convention) == pytest.approx(r)
    assert metrics.excess_aurc(perfect, error) == 0
    assert metrics.excess_augrc(perfect, error) == 0
    if right and wrong:
        assert metrics.normalised_aurc(perfect, error) == 0
        assert metrics.normalised_aurc(constant, error) == pytest.approx(1)
        assert metrics.failure_auroc(perfect, 1 - error) == 1
        assert metrics.failure_auroc(reverse, 1 - error) == 0
        assert metrics.failure_auroc(constant, 1 - error) == 0.5
        assert metrics.fpr_at_tpr(perfect, 1 - error) == 0
        assert metrics.fpr_at_tpr(constant, 1 - error) == 1
    else:
        assert math.isnan(metrics.normalised_aurc(perfect, error))
        assert math.isnan(metrics.failure_auroc(perfect, 1 - error))
        assert math.isnan(metrics.fpr_at_tpr(perfect, 1 - error))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_equal_losses_leave_nothing_to_normalise(n):
    """0.1 n / n needn't be 0.1 in floats; the quotient of two rounding errors means nothing."""
    assert math.isnan(metrics.normalised_aurc(np.arange(n), np.full(n, 0.1)))


def test_random_ranking_has_the_full_coverage_risk_on_average():
    error = np.r_[np.zeros(30), np.ones(10)]
    rng = np.random.default_rng(0)
    areas = [metrics.aurc(rng.permutation(40), error) for _ in range(2000)]
    assert abs(np.mean(areas) - 0.25) < 3 * np.std(areas) / math.sqrt(2000)


def test_conventions_agree_for_many_examples_and_differ_for_few():
    areas = [metrics.aurc(*example(100_000), convention=c) for c in CONVENTIONS]
    np.testing.assert_allclose(areas, areas[0], rtol=1e-3)
    few = [metrics.aurc(*HAND, convention=c) for c in CONVENTIONS]
    assert len({round(area, 6) for area in few}) == 3


def test_excess_of_fd_shifts_tends_to_that_of_mean():
    confidence, error = example(200_000)
    assert metrics.excess_aurc(confidence, error) == pytest.approx(
        metrics.excess_aurc(confidence, error, convention="fd_shifts"), abs=1e-4
    )


@given(rows(any_loss, min_size=2))
def test_areas_match_the_oracles(data):
    confidence, loss = split(data)
    near = {"rel": 1e-12, "abs": 1e-12}
    best = oracles.ranked_best(loss)
    for convention in CONVENTIONS:
        area = oracles.aurc(confidence, loss, convention)
        assert metrics.aurc(confidence, loss, convention=convention) == pytest.approx(area, **near)
    excess = oracles.aurc(confidence, loss) - oracles.aurc(best, loss)
    assert metrics.excess_aurc(confidence, loss) == pytest.approx(excess, **near)
    room = loss.mean() - oracles.aurc(best, loss)
    if room > 1e-6:
        assert metrics.normalised_aurc(confidence, loss) == pytest.approx(excess / room, rel=1e-6)
    assert metrics.augrc(confidence, loss) == pytest.approx(oracles.augrc(confidence, loss), **near)
    assert metrics.excess_augrc(confidence, loss) == pytest.approx(
        oracles.augrc(confidence, loss) - oracles.augrc(best, loss), **near
    )
    if not set(loss) <= {0.0, 1.0}:
        assert metrics.excess_aurc(confidence, loss, convention="fd_shifts") == pytest.approx(
            oracles.aurc(confidence, loss, "fd_shifts") - oracles.aurc(best, loss, "fd_shifts"),
            **near,
        )


@given(rows(zero_one, max_size=30))
def test_augrc_is_a_function_of_auroc_and_accuracy(data):
    """AUGRC = (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 (Traub et al. 2024), exactly."""
    confidence, error = split(data)
    a = 1 - error.mean()
    auroc = metrics.failure_auroc(confidence, 1 - error) if 0 < a < 1 else 0.0
    assert metrics.augrc(confidence, error) == pytest.approx(
        (1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2, abs=1e-14
    )


@given(rows(any_loss))
def test_no_ranking_beats_the_best(data):
    confidence, loss = split(data)
    assert metrics.excess_aurc(confidence, loss) >= -1e-12
    assert metrics.excess_augrc(confidence, loss) >= -1e-12
    assert metrics.excess_aurc(-loss, loss) == 0
