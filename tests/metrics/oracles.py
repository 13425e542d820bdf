"""Slow and obvious versions of the metrics, from their definitions, as references for the tests.

O(n^2) or worse, plain Python, no sorting: a tie is resolved by probabilities (how likely is this
example among the k most confident?) or, for a handful of examples, by enumerating every order.
"""

import itertools
import math


def risks(confidence, loss):
    """Expected mean loss of the k most confident, k = 1..n, under a random order of ties."""
    n = len(confidence)
    result = []
    for k in range(1, n + 1):
        total = 0.0
        for i in range(n):
            above = sum(c > confidence[i] for c in confidence)
            tied = sum(c == confidence[i] for c in confidence)
            total += loss[i] * min(1.0, max(0.0, (k - above) / tied))
        result.append(total / k)
    return result


def risks_by_enumeration(confidence, loss):
    """The same for tiny n: the average over every order that the confidences allow."""
    n = len(confidence)
    orders = [
        order
        for order in itertools.permutations(range(n))
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order))
    ]
    return [sum(sum(loss[i] for i in o[:k]) / k for o in orders) / len(orders)
            for k in range(1, n + 1)]  # fmt: skip


def points(confidence, loss):
    """(coverage, risk) at every distinct confidence, most confident first."""
    result = []
    for threshold in sorted(set(confidence), reverse=True):
        accepted = [x for c, x in zip(confidence, loss, strict=True) if c >= threshold]
        result.append((len(accepted) / len(loss), sum(accepted) / len(accepted)))
    return result


def trapezoid(curve):
    return sum((c1 - c0) * (r0 + r1) / 2 for (c0, r0), (c1, r1) in itertools.pairwise(curve))


def aurc(confidence, loss, convention="mean"):
    n = len(loss)
    if convention == "fd_shifts":
        curve = points(confidence, loss)
        return trapezoid([(0.0, curve[0][1]), *curve])
    expected = risks(confidence, loss)
    if convention == "mean":
        return sum(expected) / n
    curve = [((k + 1) / n, risk) for k, risk in enumerate(expected)]
    return trapezoid(curve) / (1 - 1 / n)


def augrc(confidence, loss):
    curve = [(coverage, risk * coverage) for coverage, risk in points(confidence, loss)]
    return trapezoid([(0.0, 0.0), *curve])


def ranked_best(loss):
    """A confidence that ranks every example by its loss, without ties."""
    order = sorted(range(len(loss)), key=lambda i: loss[i])
    confidence = [0.0] * len(loss)
    for position, i in enumerate(order):
        confidence[i] = -float(position)
    return confidence


def coverage_at_risk(confidence, loss, risk):
    n = len(loss)
    met = [k + 1 for k, e in enumerate(risks(confidence, loss)) if e <= risk]
    return max(met) / n if met else 0.0


def failure_auroc(confidence, correct):
    right = [c for c, ok in zip(confidence, correct, strict=True) if ok]
    wrong = [c for c, ok in zip(confidence, correct, strict=True) if not ok]
    if not right or not wrong:
        return math.nan
    wins = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong)
    return wins / (len(right) * len(wrong))


def fpr_at_tpr(confidence, correct, tpr):
    right = [c for c, ok in zip(confidence, correct, strict=True) if ok]
    wrong = [c for c, ok in zip(confidence, correct, strict=True) if not ok]
    if not right or not wrong:
        return math.nan
    for threshold in sorted(set(confidence), reverse=True):
        if sum(c >= threshold for c in right) / len(right) >= tpr:
            return sum(c >= threshold for c in wrong) / len(wrong)
    raise AssertionError("the smallest confidence accepts everything")


def calibration_error_by_width(confidence, correct, bins):
    n = len(confidence)
    error = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i in range(n) if low < confidence[i] <= high]
        gap = sum(correct[i] for i in inside) - sum(confidence[i] for i in inside)
        error += abs(gap) / n
    return error


def calibration_error_by_mass(confidence, correct, bins):
    """Bin b holds the ranks from b n // bins on, by confidence; a tie shares its accuracy."""
    n = len(confidence)
    order = sorted(range(n), key=lambda i: -confidence[i])
    error = 0.0
    for b in range(bins):
        gap = 0.0
        for i in order[b * n // bins : (b + 1) * n // bins]:
            tied = [correct[j] for j in range(n) if confidence[j] == confidence[i]]
            gap += sum(tied) / len(tied) - confidence[i]
        error += abs(gap) / n
    return error


def brier(probabilities, labels):
    return sum(
        (p - (k == y)) ** 2
        for row, y in zip(probabilities, labels, strict=True)
        for k, p in enumerate(row)
    ) / len(labels)


def negative_log_likelihood(probabilities, labels):
    right = [row[y] for row, y in zip(probabilities, labels, strict=True)]
    return sum(-math.log(p) if p > 0 else math.inf for p in right) / len(right)
