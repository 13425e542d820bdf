"""The bound against exact arithmetic and scipy."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sync_jax.guarantees import clopper_pearson_upper
from sync_jax.guarantees.binomial import at_most, fewest_accepted, most_errors


def exact_tail(errors, n, rate):
    """P(Binomial(n, rate) <= errors) in rational arithmetic."""
    p = Fraction(rate)
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(errors + 1))


@pytest.mark.parametrize("delta", [0.2, 0.05, 1e-3, 1e-9])
@pytest.mark.parametrize(("errors", "n"), [(0, 1), (0, 30), (1, 2), (3, 100), (29, 30), (57, 80)])
def test_clopper_pearson_inverts_the_exact_binomial_tail(errors, n, delta):
    bound = clopper_pearson_upper(errors, n, delta)
    assert float(exact_tail(errors, n, bound)) == pytest.approx(delta, rel=1e-9)
    assert isinstance(bound, float)


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(1e-6, 0.5))
def test_clopper_pearson_matches_the_beta_quantile_of_scipy(n, share, delta):
    errors = math.floor(share * (n - 1))
    bound = clopper_pearson_upper(errors, n, delta)
    assert bound == pytest.approx(stats.beta.ppf(1 - delta, errors + 1, n - errors), rel=1e-8)
    assert bound > errors / n
    assert clopper_pearson_upper(errors + 1, n, delta) > bound
    assert clopper_pearson_upper(errors, n + 1, delta) < bound
    assert clopper_pearson_upper(errors, n, delta / 2) > bound


def test_clopper_pearson_broadcasts_and_is_1_where_all_are_errors():
    bounds = clopper_pearson_upper(np.array([[0], [2]]), np.array([2, 10, 100]), 0.1)
    assert bounds.shape == (2, 3)
    assert bounds[1, 0] == clopper_pearson_upper(0, 0, 0.1) == 1
    assert bounds[1, 2] == clopper_pearson_upper(2, 100, 0.1)


@pytest.mark.parametrize("delta", [0.3, 0.05, 1e-6])
@pytest.mark.parametrize("target_risk", [1e-11, 1e-9, 0.01, 0.3, 0.95])
def test_counts_and_sizes_invert_each_other(target_risk, delta):
    """Also beyond 2^31 examples, where scipy's bdtr returns NaN."""
    for errors in (0, 1, 7):
        n = fewest_accepted(target_risk, delta, errors)
        assert most_errors(n, target_risk, delta) == errors
        assert most_errors(n - 1, target_risk, delta) == errors - 1
        assert clopper_pearson_upper(errors, n, delta) <= target_risk * (1 + 1e-9)
        assert clopper_pearson_upper(errors, n - 1, delta) > target_risk * (1 - 1e-9)
    random = np.random.default_rng(0).integers(0, 5000, 60)
    for sizes in (np.arange(n - min(n, 20), n + 20), random):
        each = [most_errors(size, target_risk, delta) for size in sizes]
        assert most_errors(sizes, target_risk, delta).tolist() == each
    assert fewest_accepted(1e-11, 0.05) == pytest.approx(
        math.log(0.05) / math.log1p(-1e-11), rel=1e-12
    )


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.001, 0.999))
def test_the_tail_is_exact(errors, more, rate):
    n = errors + more
    expected = min(float(exact_tail(min(errors, n), n, rate)), 1.0)
    assert float(at_most(errors, n, rate)) == pytest.approx(expected, rel=1e-9)
    assert at_most(-1, n, rate) == 0


@pytest.mark.parametrize(
    ("errors", "n", "delta", "message"),
    [
        (0.29 * 100, 100, 0.1, "errors must be integers"),  # 28.999...: which count is meant?
        (1, 10.0, 0.1, "n must be integers"),
        (-1, 10, 0.1, "errors must lie in"),
        (11, 10, 0.1, "errors must lie in"),
        (0, -1, 0.1, "n must be non-negative"),
        (0, 10, 0, "delta must lie"),
        (0, 10, 1, "delta must lie"),
        (0, 10, math.nan, "delta must lie"),
    ],
)
def test_clopper_pearson_refuses_by_name(errors, n, delta, message):
    with pytest.raises(ValueError, match=message):
        clopper_pearson_upper(errors, n, delta)
