import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sync_jax import guarantees, metrics
from sync_jax.config import default_config
from sync_jax.data.splits import Part
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions, predict
from sync_jax.evaluation.record import evaluation_record, fit_parameters, summary
from sync_jax.scores import SCORES

# --- predict --------------------------------------------------------------------------------------


def make_part(size):
    rng = np.random.default_rng(size)
    return Part(
        images=rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8),
        labels=rng.integers(0, 3, size).astype(np.int32),
        index=rng.permutation(1000)[:size],
    )


class Spy:
    """Outputs that can be worked out by hand, and a record of what it was asked."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.seen = []

    def __call__(self, images):
        assert images.shape == (self.batch_size, 8, 8, 1)
        assert images.dtype == np.uint8
        self.seen.append(images)
        flat = np.asarray(images, np.float32).reshape(len(images), -1)
        return {
            "logits": np.stack([flat.sum(axis=1), flat[:, 0], flat[:, -1]], axis=1),
            "selection_logits": flat.max(axis=1).astype(ml_dtypes.bfloat16),
        }


@given(size=st.integers(1, 25), batch_size=st.integers(1, 30))
@settings(max_examples=60)
def test_every_example_exactly_once_in_order(size, batch_size):
    part, spy = make_part(size), Spy(batch_size)
    predictions = predict(part, spy, batch_size)
    expected = [Spy(1)(image[None]) for image in part.images]
    for name, output in predictions.outputs.items():
        np.testing.assert_array_equal(output, np.concatenate([row[name] for row in expected]))
        assert output.dtype == np.float32
    np.testing.assert_array_equal(predictions.labels, part.labels)
    np.testing.assert_array_equal(predictions.index, part.index)
    # Whole batches, of which the last is filled up with zeros.
    seen = np.concatenate(spy.seen)
    assert len(spy.seen) == -(-size // batch_size)
    np.testing.assert_array_equal(seen[:size], part.images)
    assert not seen[size:].any()


def test_no_examples():
    with pytest.raises(InputError, match="no examples"):
        predict(make_part(0), Spy(4), 4)


# --- Predictions ----------------------------------------------------------------------------------


def binary(margins, labels, selection=None):
    """Predictions of two classes with logits (margin, 0): class 0 where the margin is positive."""
    margins = np.asarray(margins, np.float32)
    outputs = {"logits": np.stack([margins, np.zeros_like(margins)], axis=1)}
    if selection is not None:
        outputs["selection_logits"] = np.asarray(selection, np.float32)
    return Predictions(outputs, np.asarray(labels, np.int32), np.arange(len(labels)))


def test_derived_values_by_hand():
    predictions = binary([math.log(3), -math.log(4)], [0, 0], selection=[0.0, math.log(3)])
    np.testing.assert_array_equal(predictions.wrong, [0.0, 1.0])
    expected = [[0.75, 0.25], [0.2, 0.8]]
    np.testing.assert_allclose(predictions.probabilities, expected, rtol=1e-6)
    response = predictions.confidence("softmax_response")
    np.testing.assert_allclose(response, [0.75, 0.8], rtol=1e-6)
    np.testing.assert_allclose(predictions.confidence("selection"), [0.5, 0.75], rtol=1e-6)
    assert predictions.mean_selection == pytest.approx(0.625, rel=1e-6)
    assert {predictions.wrong.dtype, predictions.probabilities.dtype, response.dtype} == {
        np.dtype(np.float64)
    }


def test_confident_examples_stay_apart():
    predictions = binary([25.0, 30.0, 35.0], [0, 1, 0])
    assert len(set(predictions.confidence("softmax_response"))) == 3
    assert np.all(predictions.probabilities > 0)


@pytest.fixture
def saved(tmp_path):
    predictions = binary([1.0, -2.0, 0.5], [0, 1, 1], selection=[0.1, 0.2, -3.0])
    path = tmp_path / "predictions.npz"
    predictions.save(path)
    return predictions, path


def same(first, second):
    pairs = [(first.labels, second.labels), (first.index, second.index)]
    pairs += [(first.outputs[name], second.outputs[name]) for name in first.outputs]
    return first.outputs.keys() == second.outputs.keys() and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
    )


def test_save_and_load(saved):
    predictions, path = saved
    assert same(Predictions.load(path), predictions)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.npz"]
    binary([1.0], [0]).save(path)  # over an older one
    assert same(Predictions.load(path), binary([1.0], [0]))


def test_a_failing_save_leaves_the_older_file(saved, monkeypatch):
    predictions, path = saved

    def full(file, **arrays):
        file.write(b"PK")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        binary([1.0], [0]).save(path)
    assert same(Predictions.load(path), predictions)


def test_a_damaged_byte_is_an_error_or_harmless(saved):
    """Never another exception, and never other numbers."""
    predictions, path = saved
    content = path.read_bytes()
    errors = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x81]) + content[place + 1 :])
        try:
            loaded = Predictions.load(path)
        except InputError:
            errors += 1
            continue
        # The zip directory, which has no checksum, may forget an output.
        kept = {name: predictions.outputs[name] for name in loaded.outputs}
        assert same(loaded, dataclasses.replace(predictions, outputs=kept)), place
    assert errors > len(content) / 2


def test_files_that_are_no_predictions(saved):
    _, path = saved
    content = path.read_bytes()
    np.save(path.with_name("array.npy"), np.zeros(3))
    damaged = [path.with_name("array.npy"), path.parent]
    for size in (0, 1, 3, 4, 10, 100, len(content) // 2, len(content) - 1):
        damaged.append(path.with_name(f"{size} bytes"))
        damaged[-1].write_bytes(content[:size])
    integers = {"labels": np.zeros(3, int), "index": np.arange(3)}
    for i, arrays in enumerate(
        (
            {},
            integers,
            {**integers, "outputs/logits": np.zeros((2, 2))},
            {**integers, "index": np.arange(2), "outputs/logits": np.zeros((3, 2))},
            {"labels": integers["labels"], "outputs/logits": np.zeros((3, 2))},
            {**integers, "labels": np.array([{}] * 3), "outputs/logits": np.zeros((3, 2))},
            {**integers, "labels": np.zeros(3), "outputs/logits": np.zeros((3, 2))},
        )
    ):
        damaged.append(path.with_name(f"{i}.npz"))
        np.savez(damaged[-1], **arrays)
    for each in damaged:
        with pytest.raises(InputError, match=re.escape(f"{each} is damaged")):
            Predictions.load(each)
    with pytest.raises(InputError, match=r"p\.npz is missing; give the training command again"):
        Predictions.load(path.with_name("p.npz"))


# --- The record -----------------------------------------------------------------------------------

# Softmax responses descend: .9820, .9526, .8808, .7311; the third is wrong. g ranks it last.
TEST = binary([4.0, 3.0, 2.0, 1.0], [0, 0, 1, 0], selection=[1.0, 3.0, -1.0, 2.0])
# Five examples: log odds of 3.5, 3.2, 1.5, 0.8, 0.2; the fifth is wrong.
CALIBRATION = binary(
    [3.5, -3.2, 1.5, 0.8, 0.2], [0, 1, 0, 0, 1], selection=[2.5, 1.5, 0.0, 0.5, -0.8]
)


def response(margin):
    return 1 / (1 + math.exp(-margin))


@pytest.fixture(scope="module")
def config():
    config = default_config()
    config.target_coverage = 0.8
    config.evaluation.coverages = (100, 75, 50, 20)
    config.evaluation.target_risks = (0.01,)
    return config


@pytest.fixture(scope="module")
def record(config):
    return evaluation_record(CALIBRATION, TEST, config, score="selection")


def test_summary_by_hand(record):
    p = [response(margin) for margin in (4, 3, 2, 1)]
    right = [p[0], p[1], 1 - p[2], p[3]]
    expected = {
        "n": 4,
        "accuracy": 0.75,
        "negative_log_likelihood": -sum(map(math.log, right)) / 4,
        "brier": sum(2 * (1 - x) ** 2 for x in right) / 4,
        # Fifteenths: the first two share a bin, the others have their own.
        "ece_15_bins_of_equal_width": (2 - p[0] - p[1] + p[2] + 1 - p[3]) / 4,
        # Each example is a bin.
        "ece_15_bins_of_equal_mass": ((1 - p[0]) + (1 - p[1]) + p[2] + (1 - p[3])) / 4,
        "mean_selection": sum(map(response, (1, 3, -1, 2))) / 4,
    }
    assert record["test"] == pytest.approx(expected, rel=1e-6)
    assert "mean_selection" not in summary(binary([1.0], [0]))  # it has no selection head
    assert record["calibration"]["n"] == 5
    assert record["calibration"]["accuracy"] == 0.8


def test_rankings_by_hand(record):
    score = record["scores"]["softmax_response"]
    # Selective risks of the 1, 2, 3, 4 most confident: 0, 0, 1/3, 1/4.
    assert score["aurc"] == pytest.approx(
        {
            "mean": (1 / 3 + 1 / 4) / 4,
            # Trapezoids over coverage; from 0 on, or from 1/4 on and over 3/4.
            "fd_shifts": (1 / 6 + 7 / 24) / 4,
            "torch_uncertainty": (1 / 6 + 7 / 24) / 3,
        },
        rel=1e-12,
    )
    # The best ranking's are 0, 0, 0, 1/4.
    assert score["excess_aurc"] == pytest.approx(
        {"mean": 1 / 12, "fd_shifts": 11 / 96 - (1 / 4 + 3 / 4 * math.log(3 / 4))}
    )
    assert score["normalised_aurc"] == pytest.approx((1 / 12) / (1 / 4 - 1 / 16))
    # Joint risk 0, 0, 1/4, 1/4 at coverages 1/4 to 1; at best 0, 0, 0, 1/4.
    assert score["augrc"] == pytest.approx((1 / 8 + 1 / 4) / 4)
    assert score["excess_augrc"] == pytest.approx(1 / 16)
    # Two of the three correct ones are above the error; to have all three, it must be accepted.
    assert score["failure_auroc"] == pytest.approx(2 / 3)
    assert score["fpr_at_95_tpr"] == 1.0
    perfect = record["scores"]["selection"]
    assert perfect["aurc"]["mean"] == pytest.approx(1 / 16)
    assert (perfect["failure_auroc"], perfect["fpr_at_95_tpr"]) == (1.0, 0.0)


def test_rank_based_by_hand(record):
    rows = record["scores"]["softmax_response"]["rank_based"]
    assert [row["coverage"] for row in rows] == [1.0, 0.75, 0.5, 0.2]
    # 20 % of four is one example.
    assert [row["selective_risk"] for row in rows] == pytest.approx([1 / 4, 1 / 3, 0.0, 0.0])


def test_deployed_by_hand(record):
    """Thresholds are of the calibration log odds; coverage and risk are those of the test split."""
    rows = record["scores"]["softmax_response"]["deployed"]
    # 100, 75, 50 and 20 % of five calibration examples: 5, 4, 3, 1 of them.
    bounds = [(-math.inf, 0.2), (0.2, 0.8), (0.8, 1.5), (3.2, 3.5)]
    for row, (low, high) in zip(rows, np.float32(bounds), strict=True):
        assert low < row["threshold"] == np.float32(row["threshold"]) <= high
    expected = {
        "target_coverage": [1.0, 0.75, 0.5, 0.2],
        "n_accepted": [4, 4, 3, 1],
        "n_errors": [1, 1, 1, 0],
        "coverage": [1.0, 1.0, 0.75, 0.25],
        "selective_risk": [1 / 4, 1 / 4, 1 / 3, 0.0],
        "n_rejected": [0, 0, 1, 3],
        "n_rejected_errors": [0, 0, 0, 1],
    }
    assert rows[0].keys() == expected.keys() | {"threshold"}
    for name, values in expected.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-6), name
    # 80 % of five: the second least confident.
    point = record["scores"]["selection"]["operating_point"]
    assert point["target_coverage"] == 0.8
    assert -0.8 < point["threshold"] <= 0  # logits of g, as the record says
    assert record["scores"]["selection"]["thresholds_on"] == "logit of g"
    assert record["scores"]["softmax_response"]["thresholds_on"] == "log odds"
    assert (point["n_accepted"], point["n_errors"], point["coverage"]) == (3, 0, 0.75)


METHODS = [
    "sgr_fixed_sequence",
    "sgr",
    "learn_then_test/bonferroni",
    "learn_then_test/holm",
    "learn_then_test/fixed_sequence",
    "conformal_risk_control",
]


def test_infeasible_certificates(record):
    """Five examples cannot promise an error of 1 %, by any method."""
    certificates = record["scores"]["selection"]["certificates"]
    assert [certificate["method"] for certificate in certificates] == METHODS
    for certificate in certificates:
        assert certificate["feasible"] is False
        assert certificate["reason"]
        assert certificate["threshold"] is None
        assert certificate["target_risk"] == 0.01
        assert certificate["n_calibration"] == 5
        test = certificate["test"]
        assert (test["threshold"], test["n_accepted"], test["coverage"]) == (None, 0, 0.0)
        assert math.isnan(test["selective_risk"])


def saturated(seed, n=1500):
    """Logits up to some 60, as of a network that has learnt its training data by heart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    sure = 12 * rng.random((n, 1)) ** 2
    outputs = {
        "logits": sure * (rng.normal(size=(n, 4)) + 3 * np.eye(4)[labels]),
        "selection_logits": (4 * sure + rng.normal(size=(n, 1)))[:, 0],
        "abstention_logits": rng.normal(size=n) - 30 * sure[:, 0] + 200,
    }
    outputs = {name: array.astype(np.float32) for name, array in outputs.items()}
    return Predictions(outputs, labels, np.arange(n))


@pytest.mark.parametrize("own", ["selection", "abstention"])
def test_who_computes_in_float32_decides_as_the_report_does(own):
    calibration, test = saturated(0), saturated(1)
    assert 40 < test.outputs["logits"].max() < 80
    record = evaluation_record(calibration, test, default_config(), score=own)
    on_device = {name: jnp.asarray(array) for name, array in test.outputs.items()}
    ordered = jnp.sort(on_device["logits"], axis=-1)
    others = jax.nn.logsumexp(ordered[:, :-1], axis=-1)
    confidences = {
        "softmax_response": [
            SCORES["log_odds"].function(on_device),
            SCORES["log_odds"].function(test.outputs),
            ordered[:, -1] - others,  # as anyone would write it
        ],
        own: [SCORES[own].unsaturated.function(on_device)],
    }
    compared = 0
    for name, several in confidences.items():
        score = record["scores"][name]
        found = [(x["threshold"], x) for x in (*score["deployed"], score["operating_point"])]
        found += [(x["threshold"], x["test"]) for x in score["certificates"] if x["feasible"]]
        for threshold, expected in found:
            for confidence in several:
                assert confidence.dtype == np.float32
                accepted = np.asarray(confidence >= np.float32(threshold))
                assert accepted.sum() == expected["n_accepted"]
                assert test.wrong[accepted].sum() == expected["n_errors"]
                compared += 1
    assert compared > 100
    # Thresholds on the scores themselves, which are the same number for many, would not do.
    response = jax.nn.softmax(on_device["logits"]).max(axis=-1)
    for name, single in ("softmax_response", response), (own, SCORES[own].function(on_device)):
        held_out, double = calibration.confidence(name), test.confidence(name)
        differences = []
        for percent in default_config().evaluation.coverages:
            threshold = metrics.threshold_for_coverage(held_out, coverage=percent / 100)
            accepted = np.sum(double >= threshold), np.sum(single >= np.float32(threshold))
            differences.append(abs(int(accepted[0]) - int(accepted[1])))
        assert max(differences) > 50


def test_class_certificates_pay_for_their_number():
    """Class 0 has thirty right examples, class 1 two: one is certified at delta / 2."""
    config = default_config()
    config.evaluation.target_risks = (0.3,)
    margins = np.concatenate([np.linspace(1.9, 0.1, 30), [-1.0, -2.0]])
    calibration = binary(margins, np.repeat([0, 1], [30, 2]))
    test = binary([1.5, 1.0, -1.0], [0, 1, 1])
    record = evaluation_record(calibration, test, config, score="softmax_response")
    first, second = record["scores"]["softmax_response"]["class_certificates"]
    assert (first["predicted_class"], second["predicted_class"]) == (0, 1)
    assert (first["feasible"], second["feasible"]) == (True, False)
    assert first["delta"] == second["delta"] == 0.025
    assert (first["n_calibration"], second["n_calibration"]) == (30, 2)
    assert (first["test"]["n_accepted"], first["test"]["n_errors"]) == (2, 1)


def test_intervals_are_those_of_the_bootstrap(record):
    score = record["scores"]["softmax_response"]
    interval = metrics.bootstrap_interval(
        metrics.aurc, TEST.confidence("softmax_response"), loss=TEST.wrong
    )
    assert score["bootstrap_95"]["aurc"] == [interval.lower, interval.upper]
    difference = record["aurc_minus_softmax_response"]
    aurc = {name: record["scores"][name]["aurc"]["mean"] for name in record["scores"]}
    assert difference["estimate"] == pytest.approx(aurc["selection"] - aurc["softmax_response"])
    assert difference["lower"] <= difference["estimate"] <= difference["upper"]


def test_feasible_certificate_by_hand():
    """Twenty right ones: delta / ceil(log2 21) = 0.01, so the error is below 1 - 0.01^(1/20)."""
    config = default_config()
    config.evaluation.target_risks = (0.5,)
    margins = np.linspace(1.9, 0.1, 20)
    record = evaluation_record(
        binary(margins, np.zeros(20), selection=margins), TEST, config, score="selection"
    )
    certificate = record["scores"]["softmax_response"]["certificates"][1]
    assert certificate["method"] == "sgr"
    assert certificate["feasible"] is True
    assert certificate["n_accepted"] == 20
    assert certificate["bound"] == pytest.approx(1 - 0.01 ** (1 / 20), rel=1e-9)
    assert certificate["threshold"] <= np.float32(0.1)
    assert certificate["delta"] == 0.05
    assert certificate["test"]["n_accepted"] == 4
    assert certificate["test"]["selective_risk"] == 0.25


def test_coverage_at_risk_by_hand(config):
    """Errors at the 3rd of four: risks 0, 0, 1/3, 1/4 at coverages 1/4 to 1."""
    config = ConfigDict(config.to_dict())
    config.evaluation.target_risks = (0.01, 0.25, 0.3)
    rows = evaluation_record(CALIBRATION, TEST, config, score="selection")["scores"]
    assert rows["softmax_response"]["coverage_at_risk"] == [
        {"risk": 0.01, "coverage": 0.5},
        {"risk": 0.25, "coverage": 1.0},
        {"risk": 0.3, "coverage": 1.0},
    ]


def test_calibration_plans_are_the_planners():
    """Of the 8 most confident of ten calibration examples, one is wrong: 12.5 %."""
    config = default_config()
    config.evaluation.target_risks = (0.1, 0.2)
    margins = np.linspace(1.9, 0.1, 10)
    calibration = binary(margins, [0, 0, 0, 1, 0, 0, 0, 0, 0, 1], selection=margins)
    record = evaluation_record(calibration, TEST, config, score="softmax_response")
    plan = guarantees.calibration_size(
        target_risk=0.2, delta=0.05 / 2, expected_risk=0.125, coverage=0.8
    )
    common = {"coverage": 0.8, "expected_risk": 0.125}
    assert record["scores"]["softmax_response"]["calibration_plans"] == [
        {"target_risk": 0.1, **common, "n_calibration": None, "power": None},
        {"target_risk": 0.2, **common, "n_calibration": plan.n_calibration, "power": plan.power},
    ]


def test_which_scores(record, config):
    assert record["method_score"] == "selection"
    of_logits = {name for name, score in SCORES.items() if score.needs == ("logits",)}
    assert record["scores"].keys() == of_logits | {"selection", "selection_times_response"}
    with_certificates = {
        name for name, score in record["scores"].items() if "certificates" in score
    }
    assert with_certificates == {"softmax_response", "selection"}
    plain = evaluation_record(
        binary([2.0, 1.0], [0, 1]), binary([2.0, 1.0], [0, 1]), config, score="softmax_response"
    )
    assert plain["scores"].keys() == of_logits


def test_the_order_of_the_norm_is_chosen_on_calibration_data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    logits = rng.normal(size=(400, 4)) + 1.5 * np.eye(4)[labels]
    logits *= rng.exponential(size=(400, 1))  # a scale that says nothing, and a norm takes away
    predictions = Predictions({"logits": logits.astype(np.float32)}, labels, np.arange(400))
    p = fit_parameters(predictions, score=SCORES["max_logit_pnorm"])["p"]
    areas = {
        order: metrics.aurc(
            predictions.confidence("max_logit_pnorm", p=order), loss=predictions.wrong
        )
        for order in (None, *range(1, 11))
    }
    assert p is not None
    assert areas[p] == min(areas.values()) < areas[None]
    assert fit_parameters(predictions, score=SCORES["margin"]) == {}


def test_where_no_norm_helps_the_softmax_response_stays():
    """The scale of the logits, which any norm takes away, tells right from wrong perfectly."""
    scale = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    labels = np.array([0, 0, 0, 0, 1, 1])
    logits = np.stack([scale, 0 * scale], axis=1).astype(np.float32)
    predictions = Predictions({"logits": logits}, labels, np.arange(6))
    assert fit_parameters(predictions, score=SCORES["max_logit_pnorm"]) == {"p": None}
