"""The objectives against numbers worked out by hand and against NumPy in float64.

The references below drop masked rows instead of weighing them by zero, take logarithms of explicit
probabilities, and add nothing to a denominator, so they share no code path with the library.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sync_jax import losses

SELECTIVENET = {"target_coverage": 0.8, "coverage_weight": 32.0, "alpha": 0.5}
SYNC = SELECTIVENET | {
    "prior_power": 3.0,
    "prior_weight": 0.7,
    "sync_weight": 0.5,
    "divergence": "bce",
}
DIVERGENCES = ("bce", "mse")


def reference_softmax(logits):
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def reference_cross_entropy(logits, labels):
    return np.array([-np.log(p[y]) for p, y in zip(reference_softmax(logits), labels, strict=True)])


def reference(
    logits,
    selection_logits,
    auxiliary_logits,
    labels,
    *,
    target_coverage,
    coverage_weight,
    alpha,
    prior_power=0.0,
    prior_weight=0.0,
    sync_weight=0.0,
    divergence="bce",
    prior=None,
):
    """The design's formula; by default Geifman & El-Yaniv (2019), equations 3 to 6.

    `prior` replaces p, for finite differences that hold it constant.
    """
    g = 1 / (1 + np.exp(-np.asarray(selection_logits, np.float64)))
    p = reference_softmax(logits).max(axis=-1) ** prior_power if prior is None else prior
    w = g * p**prior_weight
    risk = np.sum(w * reference_cross_entropy(logits, labels)) / np.sum(w)
    penalty = max(0.0, target_coverage - np.mean(w)) ** 2
    distance = {"bce": -(p * np.log(g) + (1 - p) * np.log(1 - g)), "mse": (g - p) ** 2}[divergence]
    return (
        alpha * (risk + coverage_weight * penalty)
        + (1 - alpha) * np.mean(reference_cross_entropy(auxiliary_logits, labels))
        + sync_weight * np.mean(distance)
    )


def make_inputs(seed, batch=12, classes=4, scale=2.0):
    """logits, selection_logits, auxiliary_logits and labels."""
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(scale * rng.standard_normal((batch, classes)), jnp.float32),
        jnp.asarray(scale * rng.standard_normal(batch), jnp.float32),
        jnp.asarray(scale * rng.standard_normal((batch, classes)), jnp.float32),
        jnp.asarray(rng.integers(0, classes, batch), jnp.int32),
    )


def value_and_gradients(objective):
    """Returns value and gradients by the three outputs; compiled once for each objective."""
    return jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))


OBJECTIVES = {
    "selectivenet": functools.partial(losses.selectivenet_loss, **SELECTIVENET),
    "sync-bce": functools.partial(losses.sync_loss, **SYNC),
    "sync-mse": functools.partial(losses.sync_loss, **SYNC | {"divergence": "mse"}),
}
# Whose risk does not depend on g.
MEMBERS = {
    "sync-rank": functools.partial(
        losses.sync_loss,
        **SYNC | {"prior_source": "margin", "risk_weight": "rank", "sync_target": "correctness"},
    ),
    "sync-shuffled": functools.partial(
        losses.sync_loss, **SYNC | {"prior_source": "shuffled", "risk_weight": "equal"}
    ),
}
ALL = OBJECTIVES | MEMBERS
COMPILED = {objective: value_and_gradients(objective) for objective in ALL.values()}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
and_members = pytest.mark.parametrize("objective", ALL.values(), ids=ALL.keys())


# Two examples with probabilities that can be handled by hand.
#   f: (3/4, 1/4) labelled 0 and (1/2, 1/2) labelled 1, so l = ln(4/3), ln 2
#   g: 3/4 and 1/4, so coverage 1/2;  h: uniform, so CE = ln 2
HAND = (
    jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])),
    jnp.array([math.log(3), -math.log(3)], jnp.float32),
    jnp.zeros((2, 2)),
    jnp.array([0, 1]),
)


class HandComputedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_cross_entropy(self):
        logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]))
        value = self.variant(losses.cross_entropy)(logits, jnp.array([2, 0]))
        chex.assert_shape(value, (2,))
        chex.assert_type(value, jnp.float32)
        np.testing.assert_allclose(value, [math.log(8 / 5), math.log(3)], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_softmax_response_prior(self):
        logits = jnp.log(jnp.array([[1.0, 1.0, 2.0], [1.0, 0.0, 0.0]]) + 1e-30)
        prior = functools.partial(losses.softmax_response_prior, power=3.0)
        np.testing.assert_allclose(self.variant(prior)(logits), [0.125, 1.0], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_cross_entropy_loss(self):
        logits, _, _, labels = HAND
        loss, terms = self.variant(losses.cross_entropy_loss)(logits, labels)
        np.testing.assert_allclose(loss, (math.log(4 / 3) + math.log(2)) / 2, rtol=1e-6)
        chex.assert_trees_all_equal(terms, {"cross_entropy": loss})

    @chex.variants(with_jit=True, without_jit=True)
    def test_selectivenet_loss(self):
        objective = functools.partial(losses.selectivenet_loss, **SELECTIVENET)
        loss, terms = self.variant(objective)(*HAND)
        expected = {
            # (3/4 ln(4/3) + 1/4 ln 2) / (3/4 + 1/4)
            "selective_risk": 0.75 * math.log(4 / 3) + 0.25 * math.log(2),
            "coverage_penalty": 0.09,  # (0.8 - 0.5)^2
            "weight_coverage": 0.5,
            "auxiliary_loss": math.log(2),
        }
        chex.assert_trees_all_close(terms, expected, rtol=1e-5)
        # 0.5 (0.389048 + 32 * 0.09) + 0.5 * 0.693147
        np.testing.assert_allclose(loss, 1.981098, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_sync_loss_with_bce(self):
        options = SYNC | {"prior_power": 1.0, "prior_weight": 1.0}
        loss, terms = self.variant(functools.partial(losses.sync_loss, **options))(*HAND)
        # p = 3/4, 1/2; w = 9/16, 1/8, which sum to 11/16
        risk = (9 / 16 * math.log(4 / 3) + 1 / 8 * math.log(2)) / (11 / 16)
        # -3/4 ln(3/4) - 1/4 ln(1/4) = 0.562335 and -1/2 ln(1/4) - 1/2 ln(3/4) = 0.836988
        synchronisation = (0.56233514 + 0.83698822) / 2
        expected = {
            "selective_risk": risk,
            "coverage_penalty": (0.8 - 11 / 32) ** 2,
            "weight_coverage": 11 / 32,
            "auxiliary_loss": math.log(2),
            "synchronisation": synchronisation,
        }
        chex.assert_trees_all_close(terms, expected, rtol=1e-5)
        total = 0.5 * (risk + 32 * (0.8 - 11 / 32) ** 2) + 0.5 * math.log(2) + 0.5 * synchronisation
        np.testing.assert_allclose(loss, total, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_sync_loss_with_mse(self):
        options = SYNC | {"prior_power": 1.0, "prior_weight": 0.0, "divergence": "mse"}
        loss, terms = self.variant(functools.partial(losses.sync_loss, **options))(*HAND)
        # g - p = 0 and -1/4
        np.testing.assert_allclose(terms["synchronisation"], 1 / 32, rtol=1e-6)
        np.testing.assert_allclose(loss, 1.981098 + 0.5 / 32, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_masked_mean(self):
        mean = self.variant(losses.masked_mean)
        values = jnp.array([1.0, 4.0, 10.0])
        assert mean(values, None) == 5.0
        assert mean(values, jnp.array([1.0, 1.0, 0.0])) == 2.5
        assert mean(values, jnp.array([False, True, False])) == 4.0
        assert mean(values, jnp.zeros(3)) == 0.0
        assert mean(jnp.array([jnp.nan, 4.0]), jnp.array([0, 1])) == 4.0


# --- Against NumPy --------------------------------------------------------------------------------


@pytest.mark.parametrize(("target_coverage", "coverage_weight", "alpha"), [
    (0.8, 32.0, 0.5), (0.1, 32.0, 0.5), (1.0, 1.0, 0.9), (0.7, 0.0, 1.0), (0.7, 8.0, 0.0),
])  # fmt: skip
def test_selectivenet_agrees_with_numpy(target_coverage, coverage_weight, alpha):
    options = {
        "target_coverage": target_coverage,
        "coverage_weight": coverage_weight,
        "alpha": alpha,
    }
    for seed in range(3):
        inputs = make_inputs(seed)
        loss, _ = losses.selectivenet_loss(*inputs, **options)
        np.testing.assert_allclose(loss, reference(*inputs, **options), rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("prior_power", "prior_weight", "sync_weight"), [
    (3.0, 0.0, 0.5), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.5, 2.0, 3.0),
])  # fmt: skip
def test_sync_agrees_with_numpy(divergence, prior_power, prior_weight, sync_weight):
    options = SYNC | {
        "prior_power": prior_power,
        "prior_weight": prior_weight,
        "sync_weight": sync_weight,
        "divergence": divergence,
    }
    for seed in range(3):
        inputs = make_inputs(seed)
        loss, _ = losses.sync_loss(*inputs, **options)
        np.testing.assert_allclose(loss, reference(*inputs, **options), rtol=1e-5)


def frozen_sync(logits, selection_logits, auxiliary_logits, labels, mask):
    """The whole of SYNC as it was before its family grew; never to be changed."""
    g = jax.nn.sigmoid(selection_logits)
    prior = jax.lax.stop_gradient(jnp.exp(3.0 * jnp.max(jax.nn.log_softmax(logits), axis=-1)))

    def mean(x):
        return jnp.sum(jnp.where(mask > 0, x, 0.0)) / jnp.maximum(jnp.sum(mask > 0), 1)

    weights = g * prior**0.0
    coverage = mean(weights)
    risk = mean(weights * losses.cross_entropy(logits, labels)) / (coverage + 1e-8)
    penalty = jnp.square(jnp.maximum(0.0, 0.8 - coverage))
    auxiliary = mean(losses.cross_entropy(auxiliary_logits, labels))
    loss = 0.5 * (risk + 32.0 * penalty) + (1.0 - 0.5) * auxiliary
    return loss + 0.5 * mean(optax.sigmoid_binary_cross_entropy(selection_logits, prior))


def test_the_defaults_are_bit_for_bit_what_they_were():
    """Checkpoints and results of before stay valid."""
    mask = jnp.ones(12).at[3].set(0.0)
    objectives = (
        lambda *x: frozen_sync(*x, mask),
        lambda *x: losses.sync_loss(*x, target_coverage=0.8, mask=mask)[0],
    )
    for seed, scale in ((0, 1.0), (1, 10.0)):
        inputs = make_inputs(seed, scale=scale)
        expected, found = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*inputs) for f in objectives)
        chex.assert_trees_all_equal(found, expected)


def test_the_defaults_are_the_designs():
    inputs = make_inputs(0)
    loss, _ = losses.sync_loss(*inputs, target_coverage=0.8)
    provisional = SELECTIVENET | {
        "prior_power": 3.0,
        "prior_weight": 0.0,
        "sync_weight": 0.5,
        "divergence": "bce",
    }
    assert loss == losses.sync_loss(*inputs, **provisional)[0]
    loss, _ = losses.selectivenet_loss(*inputs, target_coverage=0.8)
    assert loss == losses.selectivenet_loss(*inputs, **SELECTIVENET)[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_sync_without_prior_is_selectivenet_exactly(divergence, jit):
    options = SYNC | {"prior_weight": 0.0, "sync_weight": 0.0, "divergence": divergence}
    sync, selectivenet = (
        jit(jax.value_and_grad(lambda *x, f=f, o=o: f(*x, **o)[0], (0, 1, 2)))
        for f, o in ((losses.sync_loss, options), (losses.selectivenet_loss, SELECTIVENET))
    )
    for seed, scale in ((0, 1.0), (1, 10.0), (2, 1e4)):
        inputs = make_inputs(seed, scale=scale)
        chex.assert_trees_all_equal(sync(*inputs), selectivenet(*inputs))


@pytest.mark.parametrize("changed", [{"prior_weight": 0.5}, {"sync_weight": 0.1}])
def test_each_part_of_sync_makes_a_difference(changed):
    """Negative control of the test above."""
    inputs = make_inputs(0)
    options = SYNC | {"prior_weight": 0.0, "sync_weight": 0.0} | changed
    selectivenet, _ = losses.selectivenet_loss(*inputs, **SELECTIVENET)
    assert abs(losses.sync_loss(*inputs, **options)[0] - selectivenet) > 1e-3


@pytest.mark.parametrize(("option", "value", "message"), [
    ("divergence", "kl", "divergence must be 'bce' or 'mse', got 'kl'"),
    ("sync_target", "x", "sync_target must be 'prior' or 'correctness', got 'x'"),
    ("risk_weight", "x", "risk_weight must be 'selection', 'rank' or 'equal', got 'x'"),
    ("prior_source", "x", "prior_source='x' is unknown, or the array"),
    ("prior_source", "average", "prior_source='average' is unknown, or the array"),
    ("prior_source", "agreement", "prior_source='agreement' is unknown, or the array"),
])  # fmt: skip
def test_unknown_options(option, value, message):
    with pytest.raises(ValueError, match=message):
        losses.sync_loss(*make_inputs(0), **SYNC | {option: value})


# --- The family -----------------------------------------------------------------------------------

# f: (3/4, 1/4), (1/2, 1/2) and (1/5, 4/5);  h: (2/3, 1/3), (1/4, 3/4) and (1/2, 1/2)
FAMILY = (
    jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0], [1.0, 4.0]])),
    jnp.array([0.0, math.log(3), -math.log(3)]),  # g: 1/2, 3/4, 1/4
    jnp.log(jnp.array([[2.0, 1.0], [1.0, 3.0], [1.0, 1.0]])),
    jnp.array([1, 0, 1]),
)
SECOND = jnp.log(jnp.array([[1.0, 9.0], [3.0, 1.0], [4.0, 1.0]]))


def member(*, mask=None, **options):
    """The loss of FAMILY, its terms and gradients; without penalty and auxiliary loss."""
    options = SYNC | {"alpha": 1.0, "coverage_weight": 0.0, "prior_weight": 0.0} | options
    objective = functools.partial(losses.sync_loss, **options, mask=mask)
    return jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(*FAMILY)


@pytest.mark.parametrize(("source", "response"), [
    ("class_head", [3 / 4, 1 / 2, 4 / 5]),
    ("auxiliary_head", [2 / 3, 3 / 4, 1 / 2]),
    ("true_class", [1 / 4, 1 / 2, 4 / 5]),
    ("margin", [1 / 2, 0, 3 / 5]),
    ("average", [0.3, 0.2, 0.1]),
    ("agreement", [(3 * 1 + 1 * 9) / 40, 1 / 2, (1 * 4 + 4 * 1) / 25]),
    ("shuffled", [1 / 2, 4 / 5, 3 / 4]),
])  # fmt: skip
def test_the_prior_by_its_source(source, response):
    """The squared distance of g from it, which is a constant of the gradient."""
    g, squares = np.array([1 / 2, 3 / 4, 1 / 4]), np.square(response)
    (_, terms), (to_logits, to_selection, to_auxiliary) = member(
        prior_source=source,
        prior_power=2.0,
        divergence="mse",
        alpha=0.0,
        sync_weight=1.0,
        average_response=jnp.array([0.3, 0.2, 0.1]),
        second_logits=SECOND,
    )
    np.testing.assert_allclose(terms["synchronisation"], np.mean((g - squares) ** 2), rtol=1e-5)
    np.testing.assert_array_equal(to_logits, 0.0)
    np.testing.assert_allclose(
        to_selection, 2 * (g - squares) * g * (1 - g) / 3, rtol=1e-4, atol=1e-8
    )
    right = np.array([2, 1, 2]) - 1  # h learns from its own loss alone
    p = np.array([[2 / 3, 1 / 3], [1 / 4, 3 / 4], [1 / 2, 1 / 2]])
    one_hot = np.eye(2)[[1, 0, 1]]
    assert (right == FAMILY[3]).all()
    np.testing.assert_allclose(to_auxiliary, (p - one_hot) / 3, rtol=1e-5)


def test_a_shuffled_prior_leaves_padding_out():
    mask = jnp.array([1.0, 0.0, 1.0])
    (_, terms), _ = member(prior_source="shuffled", prior_power=1.0, divergence="mse", mask=mask)
    # Of the first and the last, whose responses are 3/4 and 4/5, each has the other's.
    expected = ((1 / 2 - 4 / 5) ** 2 + (1 / 4 - 3 / 4) ** 2) / 2
    np.testing.assert_allclose(terms["synchronisation"], expected, rtol=1e-5)


@pytest.mark.parametrize(("second", "correct"), [(None, [0, 1, 1]), (SECOND, [1, 1, 0])])
def test_correctness_as_the_target_of_g(second, correct):
    """Judges the second augmentation where there is one; of equal logits the first is predicted."""
    g, correct = np.array([1 / 2, 3 / 4, 1 / 4]), np.array(correct)
    (_, terms), _ = member(sync_target="correctness", second_logits=second)
    expected = -np.mean(np.log(np.where(correct, g, 1 - g)))
    np.testing.assert_allclose(terms["synchronisation"], expected, rtol=1e-5)


def test_rank_weights_by_hand():
    confidence = jnp.array([0.5, 0.9, 0.99, 0.1, 0.5])
    mask = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0])  # without the most confident
    real = np.array([0, 1, 3, 4])
    rank, count = losses.confidence_ranks(confidence, mask)
    assert count == 4
    np.testing.assert_array_equal(rank[real], [2.5, 1, 4, 2.5])
    share = np.array([1 / 2, 1 / 8, 7 / 8, 1 / 2])
    for c, expected in (
        (0.25, np.log([2, 4, 8 / 7, 2]) / 0.75),
        (1e-6, -np.log(share)),  # AURC's own
        (1.0, np.ones(4)),
        (1 - 1e-9, np.ones(4)),
    ):
        weights = losses.rank_weights(confidence, target_coverage=c, mask=mask)
        np.testing.assert_allclose(weights[real], expected, rtol=1e-5)
    earlier = jnp.array([0.7, jnp.nan, 0.5])  # of two batches before
    rank, count = losses.confidence_ranks(confidence, mask, earlier)
    assert count == 6
    np.testing.assert_array_equal(rank[real], [4, 1, 6, 4])


def test_rank_weights_that_begin_at_the_batchs_error_rate():
    """Of four examples one is wrong; equal where all are wrong, AURC's where none is, nearly."""
    logits = jnp.array([[4.0, 0.0], [0.0, 3.0], [2.0, 0.0], [1.0, 0.0]])
    options = SYNC | {"risk_weight": "rank", "prior_weight": 0.0}
    each = np.log1p(np.exp([-4.0, -3.0, -2.0, -1.0]))
    shares = np.array([1, 3, 5, 7]) / 8

    def risk(labels, **changed):
        arrays = logits, jnp.zeros(4), logits, jnp.asarray(labels)
        return losses.sync_loss(*arrays, **options | changed)[1]["selective_risk"]

    for labels, floor in (([0, 1, 0, 1], 0.25), ([1, 0, 1, 1], 0.99), ([0, 1, 0, 0], 0.01)):
        wrong = np.array(labels) != [0, 1, 0, 0]
        cross_entropy = each + wrong * np.array([4.0, 3.0, 2.0, 1.0])
        weights = np.minimum(-np.log(shares), -np.log(floor))
        expected = (weights * cross_entropy).sum() / weights.sum()
        np.testing.assert_allclose(risk(labels, rank_floor="error"), expected, rtol=1e-5)
        np.testing.assert_allclose(risk(labels, target_coverage=floor), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="rank_floor must be"):
        risk([0, 1, 0, 0], rank_floor="x")


def test_examples_held_out_teach_g_alone():
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    chosen, labels = jnp.array([1.0, -1.0, 0.5]), jnp.array([0, 0, 1])
    held_out = jnp.array([False, True, False])
    options = SYNC | {"risk_weight": "equal", "sync_target": "correctness", "held_out": held_out}

    def loss(logits, chosen):
        return losses.sync_loss(logits, chosen, 2 * logits, labels, **options)

    classes, selection = jax.grad(lambda *x: loss(*x)[0], argnums=(0, 1))(logits, chosen)
    assert not classes[1].any()
    assert classes[0].any()
    assert classes[2].any()
    terms = loss(logits, chosen)[1]
    expected = math.log(1 + math.exp(-1.0))  # g of the second, which is wrong
    np.testing.assert_allclose(terms["synchronisation"], expected, rtol=1e-6)
    without = jnp.array([0, 2])
    rest = losses.sync_loss(
        logits[without], chosen[without], 2 * logits[without], labels[without],
        **options | {"held_out": None},
    )[1]  # fmt: skip
    np.testing.assert_allclose(terms["selective_risk"], rest["selective_risk"], rtol=1e-6)
    np.testing.assert_allclose(terms["auxiliary_loss"], rest["auxiliary_loss"], rtol=1e-6)
    assert selection[1] != 0


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_rank_weights_give_the_mean_selective_risk_over_the_coverages_from_c_to_1(c):
    rng = np.random.default_rng(0)
    confidence, loss = rng.random(4000), rng.random(4000)
    loss += 1 - confidence  # or the order would not matter
    risks = np.cumsum(loss[np.argsort(-confidence)]) / np.arange(1, 4001)
    expected = np.mean(risks[int(c * 4000) :])
    weights = losses.rank_weights(jnp.asarray(confidence), target_coverage=c)
    assert np.mean(weights) == pytest.approx(1, abs=1e-3)
    assert np.mean(weights * loss) == pytest.approx(expected, abs=1e-3)
    assert abs(np.mean(loss) - expected) > 0.02


@pytest.mark.parametrize(("risk_weight", "weights"), [
    # Ranks 2, 3 and 1 of 3: shares 1/2, 5/6 and 1/6.
    ("rank", np.log([2, 6 / 5, 4]) * [3 / 4, 1 / 2, 4 / 5]),
    ("equal", np.array([3 / 4, 1 / 2, 4 / 5])),
])  # fmt: skip
def test_a_risk_that_g_does_not_weigh(risk_weight, weights):
    """g learns from the synchronisation and the penalty of its own coverage alone."""
    options = {"risk_weight": risk_weight, "target_coverage": 0.25, "prior_weight": 1.0}
    options |= {"prior_power": 1.0, "sync_weight": 0.0}
    (loss, terms), gradients = member(**options)
    right = np.array([1 / 4, 1 / 2, 4 / 5])
    np.testing.assert_allclose(loss, np.sum(weights * -np.log(right)) / weights.sum(), rtol=1e-5)
    assert loss == terms["selective_risk"]
    np.testing.assert_allclose(terms["weight_coverage"], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0.0)
    # The weights are constants of the gradient.
    p = np.array([[3 / 4, 1 / 4], [1 / 2, 1 / 2], [1 / 5, 4 / 5]])
    expected = weights[:, None] / weights.sum() * (p - np.eye(2)[[1, 0, 1]])
    np.testing.assert_allclose(gradients[0], expected, rtol=1e-4)
    (_, terms), gradients = member(**options | {"coverage_weight": 32.0, "target_coverage": 0.75})
    np.testing.assert_allclose(terms["coverage_penalty"], 1 / 16, rtol=1e-5)
    assert (gradients[1] < 0).all()


# --- Rivals ---------------------------------------------------------------------------------------


def test_label_smoothing_and_logit_normalisation_by_hand():
    logits, _, _, labels = FAMILY
    p = np.array([[3 / 4, 1 / 4], [1 / 2, 1 / 2], [1 / 5, 4 / 5]])
    target = 0.8 * np.eye(2)[labels] + 0.1
    loss, _ = losses.cross_entropy_loss(logits, labels, label_smoothing=0.2)
    np.testing.assert_allclose(loss, np.mean(-np.sum(target * np.log(p), axis=1)), rtol=1e-5)
    # (4, 3) has length 5: logits of (4/5, 3/5) / 0.1.
    loss, _ = losses.cross_entropy_loss(jnp.array([[4.0, 3.0]]), jnp.array([1]), logit_norm=0.1)
    np.testing.assert_allclose(loss, math.log(1 + math.exp(2)), rtol=1e-5)


def test_aurc_loss_is_the_batchs_aurc_and_its_weights_are_constants():
    logits, _, _, labels = make_inputs(0)
    mask = jnp.ones(12).at[2].set(0.0)
    kept = np.delete(np.arange(12), 2)
    each = reference_cross_entropy(logits, labels)[kept]
    order = np.argsort(-reference_softmax(logits).max(axis=-1)[kept])
    expected = np.mean(np.cumsum(each[order]) / np.arange(1, 12))
    value, gradient = jax.value_and_grad(lambda x: losses.aurc_loss(x, labels, mask=mask)[0])(
        logits
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # (H_n - H_(k-1)) / n times p - y.
    harmonic = np.array([sum(1 / j for j in range(k, 12)) for k in range(1, 12)])
    by_example = np.empty(11)
    by_example[order] = harmonic / 11
    slope = reference_softmax(logits)[kept] - np.eye(4)[labels[kept]]
    np.testing.assert_allclose(gradient[kept], by_example[:, None] * slope, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(gradient[2], 0.0)


# --- Gradients ------------------------------------------------------------------------------------


def assert_prior_is_constant(options):
    """The gradient is that of the float64 reference with p held at its value."""
    inputs = make_inputs(0, batch=5)
    prior = reference_softmax(inputs[0]).max(axis=-1) ** options["prior_power"]
    arrays = [np.asarray(x, np.float64) for x in inputs[:3]]
    grads = jax.grad(lambda *x: losses.sync_loss(*x, inputs[3], **options)[0], (0, 1, 2))(
        *inputs[:3]
    )
    for argument, grad in enumerate(grads):
        expected = np.zeros(arrays[argument].shape)
        for place in np.ndindex(expected.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in arrays]
                moved[argument][place] += step
                values.append(reference(*moved, inputs[3], **options, prior=prior))
            expected[place] = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_prior_is_a_constant_of_the_gradient(divergence, monkeypatch):
    options = SYNC | {"divergence": divergence}
    assert_prior_is_constant(options)

    def synchronisation(logits, selection_logits):
        arrays = logits, selection_logits, *make_inputs(0)[2:]
        return losses.sync_loss(*arrays, **options)[1]["synchronisation"]

    to_logits, to_selection = jax.grad(synchronisation, (0, 1))(*make_inputs(0)[:2])
    np.testing.assert_array_equal(to_logits, 0.0)
    assert np.all(np.abs(to_selection) > 1e-6)
    # Negative control.
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    assert jax.grad(synchronisation)(*make_inputs(0)[:2]).any()
    with pytest.raises(AssertionError):
        assert_prior_is_constant(options)


def test_gradients_of_the_cross_entropy():
    logits, _, _, labels = make_inputs(0, batch=5, scale=1.0)
    # The default step of 1e-4 drowns in float32: a loss of 4 is rounded by 4e-7, a slope thus by
    # 4e-3. At 1e-2 that is 4e-5, and the curvature's share is as small.
    cross_entropy = jax.jit(lambda x: losses.cross_entropy(x, labels))
    jax.test_util.check_grads(cross_entropy, (logits,), order=2, eps=1e-2)


def test_penalty_is_one_sided():
    logits, _, auxiliary_logits, labels = make_inputs(0)

    def penalty(selection_logits):
        return losses.selectivenet_loss(
            logits, selection_logits, auxiliary_logits, labels, **SELECTIVENET
        )[1]["coverage_penalty"]

    above, below = jnp.full(12, 2.0), jnp.full(12, 1.0)  # g = 0.88 and 0.73 for a target of 0.8
    np.testing.assert_array_equal(jax.grad(penalty)(above), 0.0)
    assert np.all(jax.grad(penalty)(below) < 0)


# --- Hard inputs ----------------------------------------------------------------------------------


def assert_finite(objective, inputs, mask=None):
    (loss, terms), grads = COMPILED[objective](*inputs, mask=mask)
    chex.assert_tree_all_finite((loss, terms, grads))
    chex.assert_type(loss, jnp.float32)
    chex.assert_rank([loss, *terms.values()], 0)
    return loss, terms, grads


@every_objective
@pytest.mark.parametrize("selection_sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_logits(objective, selection_sign, right):
    labels = jnp.array([0, 1, 2])
    logits = jnp.full((3, 3), -1e4).at[jnp.arange(3), (labels + (not right)) % 3].set(1e4)
    loss, terms, _ = assert_finite(
        objective, (logits, jnp.full(3, selection_sign * 1e4), -logits, labels)
    )
    selected = selection_sign >= 0
    np.testing.assert_allclose(terms["selective_risk"], 2e4 * (not right) * selected, rtol=1e-6)
    # SR is 1 here: bce is softplus(-g's logit), the squared distance (1 - g)^2.
    if "synchronisation" in terms:
        bce = objective.keywords["divergence"] == "bce"
        expected = {1.0: 0.0, 0.0: math.log(2) if bce else 0.25, -1.0: 1e4 if bce else 1.0}
        np.testing.assert_allclose(terms["synchronisation"], expected[selection_sign], rtol=1e-6)
    assert loss >= 0


@and_members
@settings(max_examples=50)
@given(
    magnitude=hnp.arrays(np.float32, (3, 9), elements=st.floats(-4, 4, width=32)),
    sign=hnp.arrays(np.float32, (3, 9), elements=st.sampled_from([-1.0, 1.0])),
    data=st.data(),
)
def test_any_magnitude_is_finite(objective, magnitude, sign, data):
    outputs = jnp.asarray(sign * 10**magnitude)
    labels = jnp.asarray(data.draw(hnp.arrays(np.int32, 3, elements=st.integers(0, 3))))
    inputs = outputs[:, :4], outputs[:, 8], outputs[:, 4:8], labels
    assert assert_finite(objective, inputs)[0] >= 0


@every_objective
def test_nothing_selected(objective):
    logits, _, auxiliary_logits, labels = make_inputs(0)
    _, terms, _ = assert_finite(objective, (logits, jnp.full(12, -1e4), auxiliary_logits, labels))
    assert terms["weight_coverage"] == 0.0
    assert terms["selective_risk"] == 0.0
    np.testing.assert_allclose(terms["coverage_penalty"], 0.64, rtol=1e-6)


@every_objective
def test_nearly_nothing_selected_keeps_the_risk(objective):
    """EPSILON must not pass for a risk: at g = 1e-4 the ratio is still the mean loss."""
    logits, _, auxiliary_logits, labels = make_inputs(0)
    logits = jnp.tile(logits[:1], (12, 1))
    inputs = (logits, jnp.full(12, -9.21), auxiliary_logits, labels[:1].repeat(12))
    _, terms, _ = assert_finite(objective, inputs)
    expected = reference_cross_entropy(logits[:1], labels[:1])[0]
    np.testing.assert_allclose(terms["selective_risk"], expected, rtol=1e-3)


@and_members
def test_one_example_and_one_class(objective):
    inputs = make_inputs(0, batch=1)
    _, terms, _ = assert_finite(objective, inputs)
    expected = reference_cross_entropy(inputs[0], inputs[3])[0]
    np.testing.assert_allclose(terms["selective_risk"], expected, rtol=1e-5)
    # Nothing can be wrong: the losses are 0, the softmax response is 1.
    inputs = make_inputs(0, classes=1)
    _, terms, grads = assert_finite(objective, inputs)
    assert terms["selective_risk"] == 0.0
    assert terms["auxiliary_loss"] == 0.0
    np.testing.assert_array_equal(grads[0], 0.0)
    g = jax.nn.sigmoid(inputs[1])
    np.testing.assert_allclose(terms["weight_coverage"], g.mean(), rtol=1e-6)


# --- Masks ----------------------------------------------------------------------------------------


@every_objective
def test_all_masked(objective):
    loss, terms, grads = assert_finite(objective, make_inputs(0), mask=jnp.zeros(12))
    for name in ("selective_risk", "weight_coverage", "auxiliary_loss", "synchronisation"):
        assert terms.get(name, 0.0) == 0.0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0.0)
    # What is left is the penalty of a coverage of 0, a constant.
    np.testing.assert_allclose(loss, 0.5 * 32 * 0.8**2, rtol=1e-6)


def test_cross_entropy_loss_all_masked():
    logits, _, _, labels = make_inputs(0)
    loss = functools.partial(losses.cross_entropy_loss, mask=jnp.zeros(12))
    result = jax.value_and_grad(loss, has_aux=True)(logits, labels)
    assert not any(x.any() for x in jax.tree.leaves(result))


@and_members
@pytest.mark.parametrize("garbage", [0.0, 1e4])
def test_masked_examples_change_nothing(objective, garbage):
    """The masked batch is the smaller batch, in its value, its terms and its gradient."""
    inputs = make_inputs(0)
    mask = np.ones(12, np.float32)
    mask[[0, 3, 4, 11]] = 0
    real = mask > 0
    filled = [jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, garbage) for x in inputs[:3]]
    labels = jnp.where(real, inputs[3], 0)
    loss, terms, grads = assert_finite(objective, (*filled, labels), mask=jnp.asarray(mask))
    expected = assert_finite(objective, [x[real] for x in inputs])
    chex.assert_trees_all_close((loss, terms), expected[:2], rtol=1e-6)
    for grad, expected_grad in zip(grads, expected[2], strict=True):
        np.testing.assert_array_equal(grad[~real], 0.0)
        np.testing.assert_allclose(grad[real], expected_grad, rtol=1e-5, atol=1e-8)


@and_members
def test_masked_nan_does_not_reach_the_value(objective):
    inputs = make_inputs(0)
    mask = jnp.ones(12).at[5].set(0.0)
    broken = [x.at[5].set(jnp.nan) for x in inputs[:3]]
    loss, terms = objective(*broken, inputs[3], mask=mask)
    chex.assert_trees_all_equal((loss, terms), objective(*inputs, mask=mask))
    chex.assert_tree_all_finite((loss, terms))


@every_objective
def test_full_mask_is_no_mask(objective):
    inputs = make_inputs(0)
    for dtype in (jnp.float32, jnp.bool_):
        masked, plain = objective(*inputs, mask=jnp.ones(12, dtype)), objective(*inputs)
        chex.assert_trees_all_close(masked, plain, rtol=1e-6)


# --- Invariances ----------------------------------------------------------------------------------


@every_objective
@given(
    order=st.permutations(range(12)),
    names=st.permutations(range(4)),
    shift=hnp.arrays(np.float32, (2, 12, 1), elements=st.integers(-64, 64).map(float)),
)
@settings(max_examples=20)
def test_order_names_and_a_shift_of_all_classes_do_not_matter(objective, order, names, shift):
    *outputs, labels = make_inputs(0)
    # In steps of 1/1024, so that shifting by an integer below 64 is exact in float32.
    logits, selection_logits, auxiliary_logits = (jnp.round(x * 1024) / 1024 for x in outputs)
    mask, order, names = jnp.ones(12).at[7].set(0.0), jnp.asarray(order), jnp.asarray(names)
    changed = (
        (logits + shift[0])[order][:, names],
        selection_logits[order],
        (auxiliary_logits + shift[1])[order][:, names],
        jnp.argsort(names)[labels[order]],
    )
    expected = (logits, selection_logits, auxiliary_logits, labels)
    chex.assert_trees_all_close(
        COMPILED[objective](*changed, mask=mask[order])[0],
        COMPILED[objective](*expected, mask=mask)[0],
        rtol=2e-6,
    )


@every_objective
def test_low_precision_inputs_are_computed_in_float32(objective):
    *outputs, labels = make_inputs(0)
    low = [x.astype(jnp.bfloat16) for x in outputs]
    exact = [x.astype(jnp.float32) for x in low]
    (loss, terms), grads = COMPILED[objective](*low, labels)
    chex.assert_type([loss, *terms.values()], jnp.float32)
    chex.assert_trees_all_equal((loss, terms), COMPILED[objective](*exact, labels)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(list(grads), low)
