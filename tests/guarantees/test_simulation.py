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
    selective_risk,
    sgr,
)

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
# Errors likelier at higher confidence somewhere.
PERVERSE = {
    "reversed": even(0.02, 0.05, 0.08, 0.15, 0.25),
    "a bump on top": even(0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.6),
    "alternating values": even(0.01, 0.25, 0.05, 0.15, 0.11, 0.05, 0.2, 0.1, atoms=True),
}


def violations(certify, population, *, n, draws=DRAWS, seed=0):
    """How often a certificate's threshold has a true risk above its bound."""
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(draws):
        certificate = certify(*population.draw(rng, n))
        if certificate.feasible:
            assert certificate.bound <= certificate.target_risk
            count += population.risk(certificate.threshold) > certificate.bound
    return count / draws


def assert_kept(rate, delta, draws=DRAWS):
    """The check that the promises pass and the broken bounds fail."""
    assert rate <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)


def all_methods(delta, target_risk=TARGET):
    options = {"target_risk": target_risk, "delta": delta}
    return {
        "sgr": lambda c, ok: sgr(c, ok, **options),
        "bonferroni": lambda c, ok: learn_then_test(c, ok, candidates=10, **options),
        "bonferroni, given thresholds": lambda c, ok: learn_then_test(
            c, ok, thresholds=np.linspace(0, 1, 11), **options
        ),
        "fixed sequence": lambda c, ok: learn_then_test(
            c, ok, procedure="fixed_sequence", **options
        ),
        "fixed sequence, given thresholds": lambda c, ok: learn_then_test(
            c, ok, procedure="fixed_sequence", thresholds=np.linspace(0, 1, 11), **options
        ),
    }


# --- The promises ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", all_methods(0.1))
@pytest.mark.parametrize("population", MONOTONE)
def test_risk_exceeds_the_bound_at_most_delta_of_the_time(method, population):
    certify = all_methods(0.1)[method]
    assert_kept(violations(certify, MONOTONE[population], n=150), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", all_methods(0.1))
@pytest.mark.parametrize("population", ["flat just above the target", "five values"])
def test_and_with_more_examples(method, population):
    """Where more thresholds have a chance, and more of delta can be spent."""
    certify = all_methods(0.1)[method]
    assert_kept(violations(certify, MONOTONE[population], n=500), 0.1)


# A fixed sequence doesn't promise this; with given thresholds it is seen to hold here all the same.
@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(all_methods(0.1).keys() - {"fixed sequence"}))
@pytest.mark.parametrize("population", PERVERSE)
def test_and_where_errors_are_likelier_at_higher_confidence(method, population):
    certify = all_methods(0.1)[method]
    assert_kept(violations(certify, PERVERSE[population], n=150), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", all_methods(0.3))
@pytest.mark.parametrize("n", [1, 3, 16])
def test_and_with_a_handful_of_examples(method, n):
    """At target 0.5 and delta 0.3 even two or three examples can be certified."""
    certify = all_methods(0.3, target_risk=0.5)[method]
    for population in (even(0.501), even(0.501, 0.501, atoms=True), even(0.8, 0.502)):
        assert_kept(violations(certify, population, n=n), 0.3)


def test_one_threshold_spends_all_of_delta():
    """Not only valid but tight: a bound that never fails would pass every test above."""
    n = 100
    target = clopper_pearson_upper(5, n, 0.1)  # 5 errors just pass
    rate = violations(
        lambda c, ok: learn_then_test(c, ok, target_risk=target, delta=0.1, thresholds=[0.0]),
        even(target + 1e-9),
        n=n,
        draws=4000,
    )
    assert abs(rate - 0.1) < 3 * math.sqrt(0.1 * 0.9 / 4000)


@pytest.mark.parametrize("n", [9, 20, 100])
@pytest.mark.parametrize(
    "population", [even(0.5), MONOTONE["smooth"], MONOTONE["most at 1.0"], PERVERSE["reversed"]]
)
def test_conformal_joint_risk_is_at_most_alpha_on_average(population, n):
    mean, standard_error = mean_joint_risk(0.1, population, n)
    assert mean <= 0.1 + 3 * standard_error


def mean_joint_risk(alpha, population, n):
    rng = np.random.default_rng(0)
    risks = np.zeros(DRAWS)
    for i in range(DRAWS):
        certificate = conformal_risk_control(*population.draw(rng, n), alpha=alpha)
        if certificate.feasible:
            risks[i] = population.joint_risk(certificate.threshold)
    return risks.mean(), risks.std() / math.sqrt(DRAWS)


GROUPS = 4
GROUP_METHODS = {
    # Bound exactly at delta by its one threshold, so that nothing is left to waste.
    "one threshold": (functools.partial(learn_then_test, thresholds=[0.0]), 100),
    "sgr": (sgr, 500),
    "bonferroni": (learn_then_test, 500),
    "fixed sequence": (functools.partial(learn_then_test, procedure="fixed_sequence"), 500),
}


def group_violations(name, *, divided=True, delta=0.1):
    """How often any of the groups breaks its promise; undivided, each takes all of delta."""
    method, n = GROUP_METHODS[name]
    target = clopper_pearson_upper(5, n, delta / GROUPS) if name == "one threshold" else TARGET
    population, rng = even(target + 1e-9), np.random.default_rng(0)
    count = 0
    for _ in range(DRAWS):
        certificates = group_certificates(
            method,
            *population.draw(rng, GROUPS * n),
            np.repeat(np.arange(GROUPS), n),
            target_risk=target,
            delta=delta if divided else delta * GROUPS,
        )
        count += any(
            certificate.feasible and population.risk(certificate.threshold) > certificate.bound
            for certificate in certificates.values()
        )
    return count / DRAWS


@pytest.mark.slow
@pytest.mark.parametrize("method", GROUP_METHODS)
def test_no_group_breaks_its_promise_more_often_than_delta_for_all_together(method):
    assert_kept(group_violations(method), 0.1)


# --- Negative controls: the same check catches what is broken -------------------------------------


def assert_caught(rate, delta, draws=DRAWS):
    with pytest.raises(AssertionError):
        assert_kept(rate, delta, draws)


def test_sgr_that_does_not_split_delta_is_caught(monkeypatch):
    bound, n = clopper_pearson_upper, 500
    monkeypatch.setattr(
        selective_risk,
        "clopper_pearson_upper",
        lambda errors, m, delta: bound(errors, m, delta * n.bit_length()),
    )
    rate = violations(all_methods(0.1)["sgr"], MONOTONE["flat just above the target"], n=n)
    assert_caught(rate, 0.1)


def test_bonferroni_that_does_not_split_delta_is_caught():
    """Ten thresholds at delta each are what ten times delta, split, amounts to."""

    def rate(delta):
        return violations(
            lambda c, ok: learn_then_test(
                c, ok, target_risk=TARGET, delta=delta, thresholds=np.linspace(0, 0.9, 10)
            ),
            MONOTONE["flat just above the target"],
            n=500,
        )

    assert_kept(rate(0.05), 0.05)
    assert_caught(rate(10 * 0.05), 0.05)


def test_sgr_with_a_truncated_error_count_is_caught(monkeypatch):
    """int(5 * (1 - 0.8)) is 0: with one error in five the bound of none is given."""
    n, delta = 5, 0.3
    assert int(n * (1 - 4 / 5)) == 0
    target = clopper_pearson_upper(0, n, delta / n.bit_length())  # no error just passes

    def rate():
        return violations(
            lambda c, ok: sgr(c, ok, target_risk=target, delta=delta),
            even(target + 1e-9, atoms=True),
            n=n,
        )

    assert_kept(rate(), delta)
    bound = clopper_pearson_upper
    monkeypatch.setattr(
        selective_risk,
        "clopper_pearson_upper",
        lambda errors, m, d: bound(int(m * (1 - (m - errors) / m)), m, d),
    )
    assert_caught(rate(), delta)


def test_a_truncated_error_count_is_caught(monkeypatch):
    """int(100 * 0.29) is 28: with 29 errors in 100 the bound of 28 is given."""
    n, delta, draws = 100, 0.1, 4000
    assert int(n * (29 / n)) == 28
    target = clopper_pearson_upper(28, n, delta)

    def rate():
        return violations(
            lambda c, ok: learn_then_test(c, ok, target_risk=target, delta=delta, thresholds=[0]),
            even(target + 1e-9),
            n=n,
            draws=draws,
        )

    assert_kept(rate(), delta, draws)
    bound = clopper_pearson_upper
    monkeypatch.setattr(
        selective_risk,
        "clopper_pearson_upper",
        lambda errors, m, d: bound((m * (errors / np.maximum(m, 1))).astype(int), m, d),
    )
    assert_caught(rate(), delta, draws)


def test_ties_broken_in_favour_of_right_answers_are_caught():
    """A sort on (confidence, correct) counts the first of a tie; the threshold accepts all."""

    def broken(confidence, correct):
        certificate = all_methods(0.1)["sgr"](confidence + 1e-9 * correct, correct)
        if not certificate.feasible:
            return certificate
        return dataclasses.replace(certificate, threshold=round(certificate.threshold, 6))

    assert_caught(violations(broken, MONOTONE["one value, just above the target"], n=150), 0.1)


def test_conformal_risk_control_without_its_correction_is_caught():
    """R <= alpha instead of (n R + 1) / (n + 1) <= alpha is the method at a larger alpha."""
    alpha, n = 0.1, 20
    mean, standard_error = mean_joint_risk((n * alpha + 1) / (n + 1), even(0.5), n)
    assert mean > alpha + 3 * standard_error


# SGR and Bonferroni leave so much of delta unspent that four times as much isn't noticed.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["one threshold", "fixed sequence"])
def test_groups_that_each_take_all_of_delta_are_caught(method):
    assert_caught(group_violations(method, divided=False), 0.1)


def test_a_plug_in_threshold_is_caught():
    """The largest coverage whose observed risk meets the target: what an uncertified user does."""

    def plug_in(confidence, correct):
        threshold = min(
            (
                t
                for t in np.quantile(confidence, np.linspace(0, 0.9, 10))
                if 1 - correct[confidence >= t].mean() <= TARGET
            ),
            default=None,
        )
        return Certificate(
            "plug-in", threshold is not None, threshold, 0, TARGET, 0.1, TARGET, 0, 0, 0, "", ""
        )

    assert_caught(violations(plug_in, MONOTONE["smooth"], n=150), 0.1)
