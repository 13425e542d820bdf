"""Every promise of sync_jax.guarantees, checked on populations whose true risk is known.

A method certifies thousands of simulated calibration splits. The share of certificates that break
their promise must stay at or below delta plus three standard errors. The same check, with the same
population, n, target and delta, run on bounds that are deliberately broken, must fail: otherwise it
would prove nothing.
"""

import dataclasses
import functools
import math

import numpy as np
import pytest

from sync_jax.guarantees import (
    Certificate,
    clopper_pearson_upper,
    conformal_risk_control,
    group_certificates,
    learn_then_test,
    methods,
    one_per_group,
    sgr,
    sgr_fixed_sequence,
)
from sync_jax.metrics import unchecked
from tests.guarantees.examples import LTT

DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Population:
    """Confidence in [0, 1] in equal cells, with an error probability per cell.

    Inside cell i of B the confidence is uniform on [i/B, (i+1)/B), or, with atoms, always (i+1)/B:
    all of the cell ties.
    """

    mass: tuple[float, ...]
    error: tuple[float, ...]
    atoms: bool = False

    def draw(self, rng, n):
        cell = rng.choice(len(self.mass), size=n, p=self.mass)
        place = 1.0 if self.atoms else rng.random(n)
        return (cell + place) / len(self.mass), rng.random(n) >= np.array(self.error)[cell]

    def accepted(self, threshold):
        """Share of each cell with confidence >= threshold."""
        upper = np.arange(1, len(self.mass) + 1)
        if self.atoms:
            return (upper / len(self.mass) >= threshold).astype(float)
        return np.clip(upper - threshold * len(self.mass), 0, 1)

    def joint_risk(self, threshold):
        """P(accepted and wrong)."""
        return float(np.dot(self.accepted(threshold) * self.mass, self.error))

    def risk(self, threshold):
        """P(wrong | accepted); 0 where nothing is accepted."""
        coverage = float(np.dot(self.accepted(threshold), self.mass))
        return self.joint_risk(threshold) / coverage if coverage > 0 else 0.0


def even(*error, atoms=False):
    return Population((1 / len(error),) * len(error), error, atoms)


TARGET = 0.1
JUST_ABOVE = TARGET + 1e-3

# Errors rarer at higher confidence, as one hopes; the sharp ones put many thresholds just above the
# target, where a certificate is wrong and easiest to obtain.
MONOTONE = {
    "smooth": even(0.5, 0.4, 0.3, 0.2, 0.15, 0.12, 0.08, 0.05, 0.02, 0.01),
    "flat just above the target": even(JUST_ABOVE),
    "one value, just above the target": even(JUST_ABOVE, atoms=True),
    "five values": even(0.35, 0.2, 0.12, JUST_ABOVE, JUST_ABOVE, atoms=True),
    "most at 1.0": Population((0.1, 0.1, 0.2, 0.6), (0.4, 0.3, 0.12, JUST_ABOVE), atoms=True),
    "a step down to the target": even(0.9, 0.9, JUST_ABOVE, JUST_ABOVE, JUST_ABOVE),
    "hopeless": even(0.9, 0.8, 0.7, 0.6),
}
# Errors likelier at higher confidence somewhere. A fixed sequence promises nothing there; with
# given thresholds it is seen to hold all the same.
PERVERSE = {
    "reversed": even(0.02, 0.05, 0.08, 0.15, 0.25),
    "a bump on top": even(0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.6),
    "alternating values": even(0.01, 0.25, 0.05, 0.15, 0.11, 0.05, 0.2, 0.1, atoms=True),
}


METHODS = {
    "sgr": sgr,
    "bonferroni": functools.partial(learn_then_test, candidates=10),
    "holm": functools.partial(LTT["holm"], candidates=10),
    "fixed sequence": LTT["fixed_sequence"],
    "hybrid with a fixed sequence": sgr_fixed_sequence,
    **{
        f"{name}, given thresholds": functools.partial(method, thresholds=np.linspace(0, 1, 11))
        for name, method in LTT.items()
    },
}
FLAT = MONOTONE["flat just above the target"]
ONE_THRESHOLD = functools.partial(learn_then_test, thresholds=[0.0])


@functools.lru_cache(maxsize=2)
def splits(population, n, draws):
    """Simulated calibration splits; the same for every method."""
    rng = np.random.default_rng(0)
    return [population.draw(rng, n) for _ in range(draws)]


@unchecked()
def violations(method, population, n, *, target_risk=TARGET, delta=0.1, draws=DRAWS):
    """How often a certificate's threshold has a true risk above its bound."""
    count = 0
    for confidence, correct in splits(population, n, draws):
        certificate = method(confidence, correct=correct, target_risk=target_risk, delta=delta)
        if certificate.feasible:
            assert certificate.bound <= certificate.target_risk
            count += population.risk(certificate.threshold) > certificate.bound
    return count / draws


def kept(rate, delta, draws=DRAWS):
    """The check that the promises pass and the broken bounds fail."""
    return rate <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)


# --- Groups of dependent examples -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Patients:
    """Groups whose examples are all right or all wrong, and share a confidence but for noise."""

    sizes: tuple[int, int]  # drawn evenly from; large groups err more often, if they differ
    error: float = 0.12

    def draw(self, rng, n):
        """Confidence, correctness and group of n groups' examples."""
        small, large = self.sizes
        size = rng.integers(small, large + 1, n)
        surer = rng.random(n) < 0.5
        # Of the surer half each group errs with `error`, of the others with twice that.
        chance = np.where(surer, self.error, 2 * self.error)
        if large > small:
            chance = chance * (0.5 + (size - small) / (large - small))
        right = rng.random(n) >= chance
        group = np.repeat(np.arange(n), size)
        confidence = surer[group] + rng.random(len(group))
        return confidence, right[group], group

    def risk(self, threshold):
        """The group-weighted risk: of groups of all sizes alike the errors average out."""
        upper, lower = np.clip(2 - threshold, 0, 1), np.clip(1 - threshold, 0, 1)
        return self.error * (upper + 2 * lower) / max(upper + lower, 1e-12)


@unchecked()
def broken(method, patients, *, alone, groups=50, target_risk=0.11, delta=0.1, draws=1000):
    """How often the risk is above the bound, by all examples or by one of each group."""
    rng, count = np.random.default_rng(1), 0
    for _ in range(draws):
        confidence, correct, group = patients.draw(rng, groups)
        rows = one_per_group(group) if alone else slice(None)
        found = method(
            confidence[rows], correct=correct[rows], target_risk=target_risk, delta=delta
        )
        if found.feasible:
            count += patients.risk(found.threshold) > found.bound
    return count / draws


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(20, 20), (1, 60)])
@pytest.mark.parametrize("name", ["sgr", "bonferroni", "hybrid with a fixed sequence"])
def test_fifty_groups_of_dependent_examples_keep_the_promise_by_one_of_each(name, sizes):
    """All of their examples break it in far more splits than delta: the control."""
    for error in (0.12, 0.2):  # just above the target, where it is easily broken, and far
        patients = Patients(sizes, error)
        assert kept(broken(METHODS[name], patients, alone=True, target_risk=0.11), 0.1, 1000)
    assert broken(METHODS[name], Patients((20, 20), 0.12), alone=False, draws=200) > 0.25


def test_one_example_of_each_group_whatever_the_groups_are_called():
    groups = np.random.default_rng(0).integers(0, 40, 300)
    rows = one_per_group(groups)
    assert len(rows) == len(np.unique(groups)) == len(np.unique(groups[rows]))
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, one_per_group([f"patient {40 - x}" for x in groups]))
    np.testing.assert_array_equal(one_per_group(np.arange(9)), np.arange(9))
    first = [np.flatnonzero(groups == g)[0] for g in np.unique(groups)]
    assert 0 < np.isin(rows, first).sum() < 15  # some eighth of them: drawn, not the first
    for bad in ([], [[1]], [0.5, np.nan]):
        with pytest.raises(ValueError, match="groups"):
            one_per_group(bad)


# --- The promises ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("population", "n", "target_risk", "delta"),
    [
        *(
            (population, 150, TARGET, 0.1)
            for population in (*MONOTONE.values(), *PERVERSE.values())
        ),
        # More thresholds have a chance, and more of delta can be spent.
        *((population, 500, TARGET, 0.1) for population in (FLAT, MONOTONE["five values"])),
        # Even two or three examples can be certified.
        *(
            (population, n, 0.5, 0.3)
            for population in (even(0.501), even(0.501, 0.501, atoms=True), even(0.8, 0.502))
            for n in (1, 3, 16)
        ),
    ],
)
def test_risk_exceeds_the_bound_at_most_delta_of_the_time(population, n, target_risk, delta):
    options = {"target_risk": target_risk, "delta": delta}
    rates = {
        name: violations(method, population, n, **options)
        for name, method in METHODS.items()
        if not (name.endswith("fixed sequence") and population in PERVERSE.values())
    }
    assert not {name: rate for name, rate in rates.items() if not kept(rate, delta)}


def test_the_hybrid_certifies_where_its_search_and_bonferroni_seldom_do():
    """Only the most confident 7 % can be certified, which a search steps over."""
    population = Population((0.6, 0.33, 0.07), (0.2, 0.1, 0.004))
    given = {
        name: sum(
            METHODS[name](confidence, correct=correct, target_risk=0.02, delta=0.05).feasible
            for confidence, correct in splits(population, 6000, 200)
        )
        for name in ("sgr", "bonferroni", "hybrid with a fixed sequence")
    }
    assert given["hybrid with a fixed sequence"] > 1.5 * max(given["sgr"], given["bonferroni"])


def test_one_threshold_spends_all_of_delta():
    """Not only valid but tight: a bound that never fails would pass every test above."""
    target = clopper_pearson_upper(5, 100, 0.1)  # 5 errors just pass
    rate = violations(ONE_THRESHOLD, even(target + 1e-9), 100, target_risk=target, draws=4000)
    assert abs(rate - 0.1) < 3 * math.sqrt(0.1 * 0.9 / 4000)


@pytest.mark.parametrize("n", [9, 20, 100])
@pytest.mark.parametrize(
    "population", [even(0.5), MONOTONE["smooth"], MONOTONE["most at 1.0"], PERVERSE["reversed"]]
)
def test_conformal_joint_risk_is_at_most_alpha_on_average(population, n):
    mean, standard_error = mean_joint_risk(0.1, population, n)
    assert mean <= 0.1 + 3 * standard_error


@unchecked()
def mean_joint_risk(alpha, population, n):
    risks = np.zeros(DRAWS)
    for i, (confidence, correct) in enumerate(splits(population, n, DRAWS)):
        certificate = conformal_risk_control(confidence, correct=correct, alpha=alpha)
        if certificate.feasible:
            risks[i] = population.joint_risk(certificate.threshold)
    return risks.mean(), risks.std() / math.sqrt(DRAWS)


GROUPS = 4
GROUP_METHODS = {
    # Bound exactly at delta by its one threshold, so that nothing is left to waste.
    "one threshold": (ONE_THRESHOLD, 100),
    "sgr": (sgr, 500),
    "bonferroni": (learn_then_test, 500),
    "fixed sequence": (LTT["fixed_sequence"], 500),
}


@unchecked()
def group_violations(name, *, delta=0.1):
    """Returns the share of draws in which any group breaks its promise."""
    method, n = GROUP_METHODS[name]
    target = clopper_pearson_upper(5, n, 0.1 / GROUPS) if name == "one threshold" else TARGET
    population = even(target + 1e-9)
    count = 0
    for confidence, correct in splits(population, GROUPS * n, DRAWS):
        certificates = group_certificates(
            method,
            confidence,
            correct=correct,
            groups=np.repeat(np.arange(GROUPS), n),
            target_risk=target,
            delta=delta,
        )
        count += any(
            certificate.feasible and population.risk(certificate.threshold) > certificate.bound
            for certificate in certificates.values()
        )
    return count / DRAWS


@pytest.mark.slow
@pytest.mark.parametrize("method", GROUP_METHODS)
def test_no_group_breaks_its_promise_more_often_than_delta_for_all_together(method):
    assert kept(group_violations(method), 0.1)
    # Undivided, each group takes all of delta. SGR and Bonferroni leave so much of it unspent that
    # four times as much isn't noticed.
    if method in ("one threshold", "fixed sequence"):
        assert not kept(group_violations(method, delta=0.1 * GROUPS), 0.1)


# --- Negative controls: the same check catches what is broken -------------------------------------


def test_sgr_that_does_not_split_delta_is_caught(monkeypatch):
    bound, n = clopper_pearson_upper, 500
    monkeypatch.setattr(
        methods,
        "clopper_pearson_upper",
        lambda errors, m, delta: bound(errors, m, delta * n.bit_length()),
    )
    assert not kept(violations(sgr, FLAT, n), 0.1)


@pytest.mark.parametrize("procedure", ["bonferroni", "holm"])
def test_a_procedure_that_does_not_split_delta_is_caught(procedure):
    """Ten thresholds at delta each are what ten times delta, split, amounts to."""
    method = functools.partial(LTT[procedure], thresholds=np.linspace(0, 0.9, 10))
    assert kept(violations(method, FLAT, 500, delta=0.05), 0.05)
    assert not kept(violations(method, FLAT, 500, delta=10 * 0.05), 0.05)


def test_a_hybrid_at_four_times_delta_is_caught():
    assert not kept(violations(sgr_fixed_sequence, FLAT, 500, delta=0.4), 0.1)


@pytest.mark.parametrize(
    ("method", "errors", "n", "delta", "tests", "truncated"),
    [
        # int(5 * (1 - 4 / 5)) is 0: with one error in five the bound of none is given.
        (sgr, 0, 5, 0.3, 3, lambda errors, m: int(m * (1 - (m - errors) / m))),
        # int(100 * 0.29) is 28: with 29 errors in 100 the bound of 28 is given.
        (ONE_THRESHOLD, 28, 100, 0.1, 1, lambda errors, m: (m * (errors / m)).astype(int)),
    ],
)
def test_a_truncated_error_count_is_caught(method, errors, n, delta, tests, truncated, monkeypatch):
    target = clopper_pearson_upper(errors, n, delta / tests)  # so many errors just pass
    population = even(target + 1e-9, atoms=True)

    def rate():
        return violations(method, population, n, target_risk=target, delta=delta, draws=4000)

    assert kept(rate(), delta, 4000)
    bound = clopper_pearson_upper
    monkeypatch.setattr(
        methods, "clopper_pearson_upper", lambda errors, m, d: bound(truncated(errors, m), m, d)
    )
    assert not kept(rate(), delta, 4000)


def test_ties_broken_in_favour_of_right_answers_are_caught():
    """A sort on (confidence, correct) counts the first of a tie; the threshold accepts all."""

    def broken(confidence, correct, **options):
        certificate = sgr(confidence + 1e-9 * correct, correct=correct, **options)
        if not certificate.feasible:
            return certificate
        return dataclasses.replace(certificate, threshold=round(certificate.threshold, 6))

    assert not kept(violations(broken, MONOTONE["one value, just above the target"], 150), 0.1)


def test_conformal_risk_control_without_its_correction_is_caught():
    """R <= alpha instead of (n R + 1) / (n + 1) <= alpha is the method at a larger alpha."""
    alpha, n = 0.1, 20
    mean, standard_error = mean_joint_risk((n * alpha + 1) / (n + 1), even(0.5), n)
    assert mean > alpha + 3 * standard_error


def test_a_plug_in_threshold_is_caught():
    """The largest coverage whose observed risk meets the target: what an uncertified user does."""

    def plug_in(confidence, correct, **_):
        observed = {
            t: 1 - correct[confidence >= t].mean()
            for t in np.quantile(confidence, np.linspace(0, 0.9, 10))
        }
        threshold = min((t for t, risk in observed.items() if risk <= TARGET), default=None)
        return Certificate(
            "plug-in", threshold is not None, threshold, 0, TARGET, 0.1, TARGET, 0, 0, 0, "", ""
        )

    assert not kept(violations(plug_in, MONOTONE["smooth"], 150), 0.1)
