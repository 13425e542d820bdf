import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sync_jax import losses
from sync_jax.config import default_config
from sync_jax.errors import InputError
from sync_jax.methods import METHODS, Trained, enqueue, training_objective
from sync_jax.scores import SCORES

# What a head adds to the network's outputs.
OUTPUT_OF_HEAD = {
    "selection": "selection_logits",
    "auxiliary": "auxiliary_logits",
    "abstention": "abstention_logits",
    "dropout": "logits",  # adds nothing
    "features": "features",
}
# What a memory adds.
REMEMBERED = {
    "self_adaptive": ("targets",),
    "ccl_sc": ("correct_keys", "correct_classes", "error_keys", "error_classes"),
}


def make_outputs():
    rng = np.random.default_rng(0)
    outputs = {
        "logits": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32),
        "selection_logits": jnp.asarray(rng.standard_normal(6), jnp.float32),
        "auxiliary_logits": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32),
        "abstention_logits": jnp.asarray(rng.standard_normal(6), jnp.float32),
        "targets": jnp.asarray(rng.random(6), jnp.float32),
        "features": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32),
    }
    for name in ("correct", "error"):
        keys = losses.unit_length(jnp.asarray(rng.standard_normal((7, 4))))
        outputs[f"{name}_keys"] = keys
        outputs[f"{name}_classes"] = jnp.array([0, 1, 2, 0, 1, 2, -1])
    return outputs, jnp.asarray(rng.integers(0, 3, 6)), jnp.array([1.0, 1, 0, 1, 1, 1])


def unusual_config() -> ConfigDict:
    """Every hyperparameter apart from its default, and from every other."""
    config = default_config()
    config.target_coverage = 0.9
    config.loss = ConfigDict(
        {
            "coverage_weight": 7.0,
            "alpha": 0.3,
            "prior_power": 2.0,
            "prior_weight": 0.6,
            "sync_weight": 1.7,
            "divergence": "mse",
            "prior_source": "auxiliary_head",
            "prior_momentum": 0.35,
            "risk_weight": "equal",
            "rank_floor": "target",
            "sync_target": "prior",
            "detach_features": True,
            "logit_prior": "fixed",
            "views": 2,
            "rank_window": 4,
            "evidence_share": 0.35,
            "label_smoothing": 0.15,
            "logit_norm": 0.25,
            "payoff": 1.9,
            "target_momentum": 0.8,
            "contrast_weight": 0.7,
            "contrast_temperature": 0.5,
            "queue_size": 5,
            "encoder_momentum": 0.6,
            "entropy_weight": 0.4,
            "warmup_epochs": 0.2,
        }
    )
    return config


def available(name):
    outputs, labels, mask = make_outputs()
    names = {"logits", *(OUTPUT_OF_HEAD[head] for head in METHODS[name].heads)}
    names |= {*REMEMBERED.get(name, ())}
    return {name: outputs[name] for name in names}, labels, mask


@pytest.mark.parametrize(("name", "heads", "score"), [
    ("ce", (), "softmax_response"),
    ("aurc", (), "softmax_response"),
    ("selectivenet", ("selection", "auxiliary"), "selection"),
    ("sync", ("selection", "auxiliary"), "selection"),
    ("deep_gamblers", ("abstention",), "abstention"),
    ("self_adaptive", ("abstention",), "abstention"),
    ("mc_dropout", ("dropout",), "softmax_response"),
    ("ccl_sc", ("features",), "softmax_response"),
])  # fmt: skip
def test_heads_and_scores(name, heads, score):
    assert (METHODS[name].heads, METHODS[name].score) == (heads, score)
    assert bool(METHODS[name].memory) == (name in {*REMEMBERED, "sync"})


@pytest.mark.parametrize("name", METHODS)
def test_its_heads_suffice(name):
    """For the objective and for the score."""
    method = METHODS[name]
    outputs, labels, mask = available(name)
    loss, terms = method.objective(outputs, labels, mask, default_config())
    chex.assert_shape([loss, *terms.values()], ())
    chex.assert_tree_all_finite((loss, terms))
    assert outputs.keys() >= {*SCORES[method.score].needs}


def test_objectives_are_the_losses_with_the_configs_values():
    outputs, labels, mask = make_outputs()
    config = unusual_config()
    common = {"target_coverage": 0.9, "coverage_weight": 7.0, "alpha": 0.3, "mask": mask}
    heads = ("logits", "selection_logits", "auxiliary_logits")
    arrays = (*(outputs[name] for name in heads), labels)
    own = {"prior_power": 2.0, "prior_weight": 0.6, "sync_weight": 1.7, "divergence": "mse"}
    own |= {"prior_source": "auxiliary_head", "risk_weight": "equal", "sync_target": "prior"}
    plain = losses.cross_entropy_loss(outputs["logits"], labels, mask=mask)
    expected = {
        "ce": losses.cross_entropy_loss(
            outputs["logits"], labels, label_smoothing=0.15, logit_norm=0.25, mask=mask
        ),
        "aurc": losses.aurc_loss(outputs["logits"], labels, mask=mask),
        "selectivenet": losses.selectivenet_loss(*arrays, **common),
        "sync": losses.sync_loss(*arrays, **common, **own),
    }
    expected["mc_dropout"] = plain
    abstaining = outputs["logits"], outputs["abstention_logits"]
    gambler = losses.deep_gamblers_loss(*abstaining, labels, payoff=1.9)
    adaptive = losses.self_adaptive_loss(*abstaining, labels, outputs["targets"])
    for name, term, per_example in (
        ("deep_gamblers", "gambler_loss", gambler),
        ("self_adaptive", "self_adaptive_loss", adaptive),
    ):
        loss = losses.masked_mean(per_example, mask)
        expected[name] = loss, {term: loss}
    contrastive = losses.masked_mean(
        losses.contrastive_loss(
            outputs["features"],
            outputs["logits"],
            labels,
            **{name: outputs[name] for name in REMEMBERED["ccl_sc"]},
            temperature=0.5,
        ),
        mask,
    )
    expected["ccl_sc"] = (
        plain[0] + 0.7 * contrastive,
        plain[1] | {"contrastive_loss": contrastive},
    )
    expected["self_adaptive"][1]["mean_target"] = losses.masked_mean(outputs["targets"], mask)
    actual = {
        name: method.objective(outputs, labels, mask, config) for name, method in METHODS.items()
    }
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize(("name", "fields"), [
    ("ce", {"label_smoothing", "logit_norm"}),
    ("aurc", set()),
    ("mc_dropout", set()),
    ("selectivenet", {"target_coverage", "coverage_weight", "alpha"}),
    ("sync", {"target_coverage", "coverage_weight", "alpha", "prior_power", "prior_weight",
              "sync_weight", "divergence", "prior_source", "risk_weight", "sync_target"}),
    ("deep_gamblers", {"payoff"}),
    ("self_adaptive", set()),
    ("ccl_sc", {"contrast_weight", "contrast_temperature"}),
])  # fmt: skip
def test_which_fields_matter(name, fields):
    """Each changes the loss of the methods that have it, and of no other."""
    outputs, labels, mask = make_outputs()
    objective = functools.partial(METHODS[name].objective, outputs, labels, mask)
    before = objective(unusual_config())[0]
    changes = {
        "target_coverage": 0.95,
        **dict.fromkeys(unusual_config().loss, 0.1),
        "divergence": "bce",
        "prior_source": "class_head",
        "risk_weight": "selection",
        "sync_target": "correctness",
        "rank_floor": "error",
        # Of the network, the step and the memory.
        "detach_features": False,
        "logit_prior": "none",
        "views": 1,
        "queue_size": 1,
        "rank_window": 0,
    }
    changed = set()
    for field, value in changes.items():
        config = unusual_config()
        (config if field == "target_coverage" else config.loss)[field] = value
        if objective(config)[0] != before:
            changed.add(field)
    assert changed == fields


@pytest.mark.parametrize("name", METHODS)
def test_mask_is_passed_on(name):
    method = METHODS[name]
    outputs, labels, mask = available(name)
    of_batch = [k for k in outputs if k not in REMEMBERED["ccl_sc"]]  # whose rows are examples

    def loss(**changed):
        return method.objective(outputs | changed, labels, mask, default_config())[0]

    assert loss(**{k: outputs[k].at[2].add(1.0) for k in of_batch}) == loss()  # the masked one
    assert loss(**{k: outputs[k].at[1].set(-outputs[k][1]) for k in of_batch}) != loss()


# --- The objective that a step minimises ----------------------------------------------------------


def step_of(name, *, warmup_steps=0, step=0, memory=None, **changes):
    """Value and gradient with respect to the outputs, and the memory after the step."""
    config = default_config()
    config.loss.update(changes)
    outputs, labels, mask = make_outputs()
    outputs = {k: v for k, v in outputs.items() if k not in sum(REMEMBERED.values(), ())}
    batch = {"label": labels, "mask": mask, "index": jnp.array([4, 0, 6, 2, 5, 1])}
    trained = Trained({"class_head": {"kernel": jnp.ones((4, 3))}}, lambda params: outputs)
    if METHODS[name].memory and memory is None:
        memory = METHODS[name].memory.create(trained.params, 8, config)
    objective = training_objective(METHODS[name], config, train_size=8, warmup_steps=warmup_steps)

    def value(outputs):
        loss, terms, after = objective(outputs, batch, memory, jnp.int32(step), trained)
        return loss, (terms, after)

    (loss, (terms, after)), gradient = jax.value_and_grad(value, has_aux=True)(outputs)
    return loss, terms, after, gradient


@pytest.mark.parametrize("name", ["sync", "ccl_sc"])
def test_entropy_minimisation_adds_its_weight_times_the_mean_entropy(name):
    outputs, _, mask = make_outputs()
    entropy = losses.masked_mean(losses.entropy(outputs["logits"]), mask)
    plain, plain_terms, *_ = step_of(name)
    loss, terms, *_ = step_of(name, entropy_weight=0.3)
    np.testing.assert_allclose(loss, plain + 0.3 * entropy, rtol=1e-6)
    chex.assert_trees_all_equal(terms, plain_terms | {"entropy": entropy})


@pytest.mark.parametrize("name", ["sync", "self_adaptive", "ccl_sc"])
def test_a_warm_up_is_plain_cross_entropy_and_ends(name):
    outputs, labels, mask = make_outputs()
    expected = jax.grad(lambda x: losses.cross_entropy_loss(x, labels, mask=mask)[0])
    loss, terms, _, gradient = step_of(name, warmup_steps=3, step=2, entropy_weight=0.3)
    assert loss == terms["cross_entropy"]
    np.testing.assert_allclose(gradient.pop("logits"), expected(outputs["logits"]), rtol=1e-6)
    assert not any(x.any() for x in gradient.values())  # no other head learns
    after = step_of(name, warmup_steps=3, step=3, entropy_weight=0.3)
    without = step_of(name, entropy_weight=0.3)
    chex.assert_trees_all_equal((after[0], *after[2:]), (without[0], *without[2:]))


def test_memories_wait_for_the_warm_up_and_the_encoder_is_the_network_until_it_is_over():
    assert (step_of("self_adaptive", warmup_steps=3, step=2)[2] == 1).all()
    assert (step_of("self_adaptive", warmup_steps=3, step=3)[2] < 1).sum() == 5  # one is masked
    params = {"class_head": {"kernel": jnp.ones((4, 3))}}
    old = METHODS["ccl_sc"].memory.create(jax.tree.map(jnp.zeros_like, params), 8, default_config())
    warming = step_of("ccl_sc", warmup_steps=3, step=2, memory=old)[2]
    chex.assert_trees_all_equal(warming["encoder"], params)
    assert (warming["correct"]["classes"] == -1).all()
    later = step_of("ccl_sc", warmup_steps=3, step=3, memory=old, encoder_momentum=0.75)[2]
    chex.assert_trees_all_close(
        later["encoder"], {"class_head": {"kernel": jnp.full((4, 3), 0.25)}}
    )
    queued = [int((later[name]["classes"] >= 0).sum()) for name in ("correct", "error")]
    assert sum(queued) == 5  # of six examples one is masked
    assert [int(later[name]["next"]) for name in ("correct", "error")] == queued


@pytest.mark.parametrize("size", [1, 3])
def test_a_queue_keeps_the_newest_in_a_ring(size):
    rng = np.random.default_rng(size)
    queue = {
        "keys": jnp.zeros((size, 2)),
        "classes": jnp.full(size, -1),
        "next": jnp.zeros((), jnp.int32),
    }
    rows = []
    for _ in range(6):
        keys, classes = rng.standard_normal((5, 2)).astype(np.float32), rng.integers(0, 9, 5)
        chosen = rng.random(5) < 0.7
        queue = enqueue(queue, jnp.asarray(keys), jnp.asarray(classes), jnp.asarray(chosen))
        rows += [(k, c) for k, c, is_chosen in zip(keys, classes, chosen, strict=True) if is_chosen]
        assert queue["next"] == len(rows) % size
        for i in range(max(len(rows) - size, 0), len(rows)):
            np.testing.assert_array_equal(queue["keys"][i % size], rows[i][0])
            assert queue["classes"][i % size] == rows[i][1]
        assert (queue["classes"] >= 0).sum() == min(len(rows), size)


def test_targets_after_n_visits_equal_the_closed_form():
    """With the same logits at each visit: m^n + (1 - m^n) p_y."""
    outputs, labels, mask = make_outputs()
    right = np.exp(-losses.cross_entropy(outputs["logits"], labels))
    memory = None
    for visits in range(1, 4):
        memory = step_of("self_adaptive", memory=memory, target_momentum=0.7)[2]
        decay = 0.7**visits
        expected = np.ones(8)
        expected[[4, 0, 6, 2, 5, 1]] = np.where(mask > 0, decay + (1 - decay) * right, 1.0)
        np.testing.assert_allclose(memory, expected, rtol=1e-5)


def test_the_average_response_begins_with_the_first_and_then_moves():
    """The loss reads it after its update; an example that is not visited keeps none."""
    outputs, _, mask = make_outputs()
    index, real = np.array([4, 0, 6, 2, 5, 1]), np.asarray(mask) > 0
    response = np.exp(jax.nn.log_softmax(outputs["logits"]).max(axis=-1))
    options = {"prior_source": "average", "prior_momentum": 0.75, "divergence": "mse"}
    options |= {"prior_power": 1.0, "sync_weight": 1.0}
    first = step_of("sync", **options)
    expected = np.full(8, -1.0)
    expected[index[real]] = response[real]
    np.testing.assert_allclose(first[2]["average"], expected, rtol=1e-6)
    plain = step_of("sync", **options | {"prior_source": "class_head"})
    np.testing.assert_allclose(first[0], plain[0], rtol=1e-6)
    later = step_of("sync", memory={"average": jnp.full(8, 0.2)}, **options)
    average = 0.75 * 0.2 + 0.25 * response
    table = later[2]["average"]
    np.testing.assert_allclose(table[index[real]], average[real], rtol=1e-6)
    assert (table[np.array([3, 7, 6])] == np.float32(0.2)).all()  # 6 is masked
    g = jax.nn.sigmoid(outputs["selection_logits"])
    expected = losses.masked_mean(jnp.square(g - average), mask)
    np.testing.assert_allclose(later[1]["synchronisation"], expected, rtol=1e-5)
    # No state for those that need none, so that their earlier checkpoints fit.
    assert step_of("sync")[2] == {}
    assert METHODS["sync"].memory.create({}, 8, default_config()) == {}


def test_agreement_needs_two_views():
    config = default_config()
    assert METHODS["sync"].check(config, 10) is None
    config.loss.prior_source = "agreement"
    with pytest.raises(InputError, match=r"set config\.loss\.views=2"):
        METHODS["sync"].check(config, 10)
    config.loss.views = 2
    assert METHODS["sync"].check(config, 10) is None


def test_the_loss_reads_the_target_after_its_update_and_not_its_gradient():
    outputs, labels, mask = make_outputs()
    targets = losses.update_targets(jnp.ones(6), outputs["logits"], labels, momentum=0.9)

    def expected(logits, abstention_logits):
        per_example = losses.self_adaptive_loss(logits, abstention_logits, labels, targets)
        return losses.masked_mean(per_example, mask)

    arrays = outputs["logits"], outputs["abstention_logits"]
    value, gradients = jax.value_and_grad(expected, (0, 1))(*arrays)
    loss, _, _, gradient = step_of("self_adaptive")
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    np.testing.assert_allclose(gradient["logits"], gradients[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient["abstention_logits"], gradients[1], rtol=1e-5, atol=1e-7)


def test_ranks_among_the_last_responses_and_a_share_that_teaches_g_alone():
    outputs, _, mask = make_outputs()
    response = np.exp(jax.nn.log_softmax(outputs["logits"]).max(axis=-1))
    options = {"risk_weight": "rank", "rank_window": 9}
    first = step_of("sync", **options)
    newest = np.where(mask > 0, response, -1.0)
    np.testing.assert_allclose(first[2]["earlier"], [-1, -1, -1, *newest], rtol=1e-6)
    alone = step_of("sync", **options | {"rank_window": 0})
    np.testing.assert_allclose(first[0], alone[0], rtol=1e-6)  # nothing came before
    before = jnp.linspace(0.1, 0.9, 9)
    then = step_of("sync", memory={"earlier": before}, **options)
    np.testing.assert_allclose(then[2]["earlier"], [*before[6:], *newest], rtol=1e-6)
    assert abs(then[1]["selective_risk"] - alone[1]["selective_risk"]) > 1e-4
    held_out = [step_of("sync", evidence_share=x)[1]["auxiliary_loss"] for x in (0.0, 0.3, 0.6)]
    assert len({float(x) for x in held_out}) == 3
