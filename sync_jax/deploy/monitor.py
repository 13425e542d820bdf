"""Is what a classifier sees still like its calibration split? Sequential tests, NumPy alone.

Each test watches without end and gives a false alarm with a chance of at most its alpha, whenever
one looks (Ville's inequality): it bets against "nothing has changed", and the wealth of such a bet
exceeds 1 / alpha with a chance of at most alpha. Simulations in tests/deploy show it.
"""

import bisect
import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.evaluation.decision import Decision

_JUMP = 0.01  # of the simple jumper: how often it changes its bet
_LONGEST = 20_000  # examples of a round: ranks among all earlier ones take memory and time
_STAKES = (0.05, 0.1, 0.25, 0.5)  # of a bet on a rate, as shares of the largest that is allowed


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A test that has found a change."""

    test: str  # "exchangeability", "acceptance" or "risk"
    after: int  # examples seen (of "risk": labelled answers) when it did
    message: str


class Exchangeability:
    """Tests whether confidences are exchangeable with those of the calibration split.

    A conformal test martingale (Vovk et al., 2021, "Retrain or not retrain"): each confidence is
    ranked among the calibration examples and all earlier ones, ties at random. If all are
    exchangeable, these ranks are independent and uniform; the simple jumper bets that they are
    not. After 20,000 examples a round begins anew; the k-th has 6 / (pi k)^2 of alpha, all together
    no more than alpha.
    """

    def __init__(self, calibration: ArrayLike, *, alpha: float = 0.01, seed: int = 0):
        """Takes confidences `[n]`; the seed is of the ties."""
        self._calibration = np.sort(np.asarray(calibration, np.float64)).tolist()
        self._alpha, self._rng = alpha, np.random.default_rng(seed)
        self._round = 0
        self._begin()

    def _begin(self) -> None:
        self._round += 1
        self._seen = list(self._calibration)
        self._capital = np.full(3, 1 / 3)

    @property
    def log_wealth(self) -> float:
        """Natural logarithm of the wealth of this round."""
        return math.log(self._capital.sum())

    @property
    def limit(self) -> float:
        """The logarithm of the wealth that is an alarm in this round."""
        return math.log((math.pi * self._round) ** 2 / 6 / self._alpha)

    def update(self, confidence: float) -> bool:
        """Takes one confidence; returns True for an alarm."""
        if len(self._seen) - len(self._calibration) >= _LONGEST:
            self._begin()
        low = bisect.bisect_left(self._seen, confidence)
        high = bisect.bisect_right(self._seen, confidence)
        rank = (low + self._rng.random() * (high - low + 1)) / (len(self._seen) + 1)
        self._seen.insert(high, confidence)
        mixed = (1 - _JUMP) * self._capital + _JUMP * self._capital.mean()
        self._capital = mixed * (1 + np.array([-1.0, 0.0, 1.0]) * (rank - 0.5))
        return self.log_wealth >= self.limit


class Rate:
    """Tests whether the rate of an event stays in an interval `[low, high]`.

    Bets on each side with several stakes; 1 + stake (x - high) has a mean of at most 1 as long as
    the rate, given the past, is at most high (Waudby-Smith & Ramdas, 2024).
    """

    def __init__(self, low: float, high: float, *, alpha: float = 0.01):
        """Takes the interval, in [0, 1], and the chance of a false alarm."""
        self._sides = [(sign, bound) for sign, bound in ((1, high), (-1, low)) if 0 < bound < 1]
        self._log = np.zeros((len(self._sides), len(_STAKES)))
        self._limit = math.log(max(len(self._sides), 1) / alpha)

    def update(self, event: bool) -> bool:
        """Takes one event or none; returns True for an alarm."""
        for row, (sign, bound) in enumerate(self._sides):
            largest = 1 / bound if sign > 0 else 1 / (1 - bound)
            gain = sign * (float(event) - bound)
            self._log[row] += np.log1p(np.asarray(_STAKES) * largest * gain)
        return self.log_wealth >= self._limit

    @property
    def log_wealth(self) -> float:
        """Natural logarithm of the wealth of the better side."""
        if not self._sides:
            return 0.0
        most = self._log.max(axis=1, keepdims=True)
        return float((most[:, 0] + np.log(np.exp(self._log - most).mean(axis=1))).max())


class Monitor:
    """Watches a classifier's confidences, acceptance and, where labels come later, its risk.

    >>> watch = Monitor(classifier.decision)
    >>> for alarm in watch.update(classifier.predict(images).confidence):
    ...     print(alarm.message)

    An alarm is given once. While nothing has changed, none of the tests of exchangeability and of
    acceptance gives one with chance 1 - alpha, and that of the risk gives none with chance 1 -
    alpha, if the certificate holds. Examples must be independent of each other: of a group, such as
    a patient, give one.
    """

    def __init__(self, decision: Decision, *, alpha: float = 0.01, seed: int = 0):
        """Takes the decision that is watched; the seed breaks ties."""
        self.decision, self.alarms = decision, list[Alarm]()
        confidence = decision.confidence
        if decision.groups is not None:
            from sync_jax.guarantees import one_per_group  # needs SciPy

            confidence = confidence[one_per_group(decision.groups)]
        self.seen = self.accepted = self.labelled = self.wrong = 0
        self._ranks = Exchangeability(confidence, alpha=alpha / 2, seed=seed)
        # However the threshold was chosen on the calibration split, the share accepted there is
        # that near to the true one for all thresholds at once (Dvoretzky-Kiefer-Wolfowitz,
        # Massart, 1990), with chance 1 - alpha / 4.
        share = float((confidence >= decision.threshold).mean())
        margin = math.sqrt(math.log(8 / alpha) / (2 * len(confidence)))
        self.expected = max(share - margin, 0.0), min(share + margin, 1.0)
        self._rate = Rate(*self.expected, alpha=alpha / 4)
        self.promised = float(decision.chosen_by.get("bound") or _calibration_risk(decision, alpha))
        self._risk = Rate(0.0, self.promised, alpha=alpha / 2)

    def update(self, confidences: ArrayLike) -> list[Alarm]:
        """Takes the confidences of further examples, in their order; returns new alarms."""
        before = len(self.alarms)
        for confidence in np.asarray(confidences, np.float64).ravel().tolist():
            self.seen += 1
            accepted = confidence >= self.decision.threshold
            self.accepted += accepted
            if self._ranks.update(confidence):
                problem = "the confidences are no longer like those of the calibration split"
                self._raise("exchangeability", self.seen, problem)
            if self._rate.update(accepted):
                share, (low, high) = self.accepted / self.seen, self.expected
                problem = (
                    f"{100 * share:.1f} % were answered so far; the calibration split implies "
                    f"{100 * low:.1f} to {100 * high:.1f} %"
                )
                self._raise("acceptance", self.seen, problem)
        return self.alarms[before:]

    def labels(self, correct: ArrayLike) -> list[Alarm]:
        """Takes whether further accepted answers were right, once that is known."""
        before = len(self.alarms)
        for right in np.asarray(correct).ravel().tolist():
            self.labelled += 1
            self.wrong += not right
            if self._risk.update(not right):
                share = self.wrong / self.labelled
                problem = (
                    f"{100 * share:.1f} % of the labelled answers are wrong, more than the "
                    f"{100 * self.promised:.2g} % that the calibration split implies; "
                    "`Decision.recalibrated` chooses a new threshold on labelled examples"
                )
                self._raise("risk", self.labelled, problem)
        return self.alarms[before:]

    def _raise(self, test: str, after: int, problem: str) -> None:
        if test not in {alarm.test for alarm in self.alarms}:
            self.alarms.append(Alarm(test, after, f"after {after:,} examples: {problem}"))


def monitor(confidences: ArrayLike, decision: Decision, *, alpha: float = 0.01) -> list[Alarm]:
    """Tests confidences `[n]`, in the order in which they came; see `Monitor`."""
    return Monitor(decision, alpha=alpha).update(confidences)


def _calibration_risk(decision: Decision, alpha: float) -> float:
    """An upper bound of the risk where no certificate gives one; by Hoeffding, at alpha / 2."""
    accepted = decision.confidence >= decision.threshold
    if not accepted.any():
        return 1.0
    wrong = 1 - float(decision.correct[accepted].mean())
    return min(wrong + math.sqrt(math.log(2 / alpha) / (2 * accepted.sum())), 1.0)
