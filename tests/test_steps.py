"""Single steps on one device and on eight simulated ones, whose results must agree."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sync_jax.config import default_config
from sync_jax.losses import cross_entropy_loss, sync_loss
from sync_jax.methods import METHODS, training_objective
from sync_jax.models.cnn import CNN
from sync_jax.models.heads import SelectiveNetwork
from sync_jax.optimizer import make_optimizer
from sync_jax.runtime import sharding
from sync_jax.steps import create_train_state, eval_step, train_step

SHAPE = (8, 8, 1)
CLASSES = 3
TRAIN_SIZE = 30  # of the memories; batches hold the examples 5 to 20


def memory_config():
    config = default_config()
    config.loss.queue_size = 10
    return config


@functools.cache
def setting(method):
    """Network, objective and optimiser; cached so that compilations are shared."""
    config = memory_config()
    config.optimizer.weight_decay = 1e-3
    network = SelectiveNetwork(
        CNN(width=2, features=8),
        num_classes=CLASSES,
        heads=METHODS[method].heads,
        target_coverage=config.target_coverage,
    )
    return {
        "network": network,
        "objective": training_objective(
            METHODS[method], config, train_size=TRAIN_SIZE, warmup_steps=0
        ),
        "optimizer": make_optimizer(config.optimizer, lambda step: 0.05),
    }


@functools.cache
def compiled_create(method):
    parts, memory = setting(method), METHODS[method].memory
    create = functools.partial(
        create_train_state,
        network=parts["network"],
        optimizer=parts["optimizer"],
        image_shape=SHAPE,
        create_memory=lambda params: (
            memory.create(params, TRAIN_SIZE, memory_config()) if memory else {}
        ),
    )
    return jax.jit(create)


@functools.cache
def initial_state(method):
    """On the host, so that no test can donate it away."""
    return jax.device_get(compiled_create(method)(jnp.uint32(0)))


@functools.cache
def compiled_step(method, devices):
    """The step over some devices; it takes its arguments from anywhere."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    copied, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    step = jax.jit(functools.partial(train_step, **setting(method)), out_shardings=copied)
    step = sharding.one_at_a_time(step, mesh)
    return lambda state, batch: step(jax.device_put(state, copied), jax.device_put(batch, split))


@functools.cache
def compiled_forward(method):
    """The network's outputs in training."""
    network = setting(method)["network"]

    @jax.jit
    def forward(state, images):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return network.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    return forward


def make_batch(batch=16, seed=0, masked=()):
    """Images of class k are brighter by k, so that there is something to learn.

    The examples are sorted by class and grow in contrast, so that no two shards are alike.
    """
    rng = np.random.default_rng(seed)
    label = np.sort(rng.integers(0, CLASSES, batch)).astype(np.int32)
    image = rng.standard_normal((batch, *SHAPE)) * np.linspace(0.3, 2.0, batch)[:, None, None, None]
    mask = np.ones(batch, np.float32)
    mask[list(masked)] = 0
    return {
        "image": (image + label[:, None, None, None]).astype(np.float32),
        "label": label,
        "mask": mask,
        "index": np.arange(5, 5 + batch, dtype=np.int32),
    }


def run(method, devices, **options):
    """The state and the metrics after a step."""
    return compiled_step(method, devices)(initial_state(method), make_batch(**options))


class Linear(nn.Module):
    """Without BatchNorm nothing connects its examples but the objective."""

    norm: bool = False

    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(images.shape[0], -1)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return {"logits": nn.Dense(CLASSES)(x)}


def plain_objective(outputs, batch, memory, step, trained):
    del step, trained
    return *cross_entropy_loss(outputs["logits"], batch["label"], mask=batch["mask"]), memory


def linear(learning_rate=0.5, *, norm=False, averaged=False, **options):
    """Its state and its step."""
    parts = {"network": Linear(norm), "optimizer": optax.sgd(learning_rate)}
    state = create_train_state(0, image_shape=SHAPE, averaged=averaged, **parts)
    options = {"objective": plain_objective} | options
    return state, functools.partial(train_step, **parts, **options)


# --- The state ------------------------------------------------------------------------------------


def test_initial_state_is_a_function_of_the_seed():
    state = initial_state("sync")
    assert state.step == 0
    chex.assert_tree_all_finite(state)
    momentum = [leaf for leaf in jax.tree.leaves(state.opt_state) if np.ndim(leaf) > 0]
    assert len(momentum) == len(jax.tree.leaves(state.params))
    assert not any(leaf.any() for leaf in momentum)
    again, other = (compiled_create("sync")(jnp.uint32(seed)) for seed in (0, 1))
    chex.assert_trees_all_equal(again, state)
    kernels = [x.params["class_head"]["kernel"] for x in (state, other)]
    assert not np.allclose(*kernels)


# --- One step -------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_batch_before_the_step():
    state, batch, parts = initial_state("sync"), make_batch(masked=(2, 5)), setting("sync")
    # So that g lies on both sides of 1/2.
    state = jax.tree.map(np.copy, state)
    head = state.params["selection_head"]
    head["Dense_1"]["bias"] *= 0
    outputs = compiled_forward("sync")(state, batch["image"])
    real = batch["mask"] > 0
    loss, terms, _ = parts["objective"](outputs, batch, {}, state.step, None)
    expected = terms | {
        "loss": loss,
        "accuracy": np.mean((outputs["logits"].argmax(axis=-1) == batch["label"])[real]),
        "mean_selection": np.mean(jax.nn.sigmoid(outputs["selection_logits"])[real]),
        "coverage": np.mean(outputs["selection_logits"][real] >= 0),
    }
    assert 0 < expected["coverage"] < 1
    after, metrics = compiled_step("sync", 1)(state, batch)
    expected["parameter_norm"] = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(after.params)))
    chex.assert_shape(list(metrics.values()), ())
    chex.assert_type(list(metrics.values()), jnp.float32)
    assert metrics.pop("gradient_norm") > 0
    assert np.isfinite(metrics.pop("state_norm"))
    chex.assert_trees_all_close(metrics, expected, rtol=1e-5)


def test_a_step_moves_everything():
    before, (after, _) = initial_state("sync"), run("sync", 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert after.step == 1
    for name in ("params", "batch_stats"):
        pairs = zip(
            jax.tree.leaves_with_path(getattr(before, name)),
            jax.tree.leaves(getattr(after, name)),
            strict=True,
        )
        for (path, old), new in pairs:
            assert not np.array_equal(old, new), f"{name}{jax.tree_util.keystr(path)}"
    assert any(leaf.any() for leaf in jax.tree.leaves(after.opt_state))


def test_a_step_by_hand():
    """Softmax regression: the gradient is (p - onehot) x^T, averaged over the real examples."""
    state, step = linear()
    batch = make_batch(masked=(0, 7))
    new, metrics = jax.jit(step)(state, batch)
    real = batch["mask"] > 0
    x = batch["image"].reshape(16, -1)[real].astype(np.float64)
    dense = state.params["Dense_0"]
    logits = x @ dense["kernel"] + dense["bias"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (p - np.eye(CLASSES)[batch["label"][real]]) / real.sum()
    gradient = {"kernel": x.T @ error, "bias": error.sum(axis=0)}
    expected = {name: dense[name] - 0.5 * gradient[name] for name in dense}
    chex.assert_trees_all_close(dict(new.params["Dense_0"]), expected, rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    nll = -np.log(p[np.arange(len(p)), batch["label"][real]]).mean()
    np.testing.assert_allclose(metrics["loss"], nll, rtol=1e-5)


@pytest.mark.parametrize("method", ["sync", "self_adaptive", "ccl_sc"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(method):
    batch, state = make_batch(), initial_state(method)
    batch["image"][3, 2, 2, 0] = np.nan
    after, metrics = compiled_step(method, 1)(state, batch)
    assert not np.isfinite(metrics["loss"])
    assert after.step == 1
    chex.assert_trees_all_equal(after.replace(step=state.step), state)
    # Negative control: without the one NaN everything moves.
    after, metrics = compiled_step(method, 1)(state, make_batch())
    assert np.isfinite(metrics["loss"])
    assert distance(after.params, state.params) > 0


def test_parameters_that_overflow_are_not_kept():
    """Loss and gradient are finite; where the step would lead is not."""
    state, step = linear(1e38)
    after, metrics = jax.jit(step)(state, make_batch())
    assert np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all()
    assert not np.isfinite(metrics["parameter_norm"])
    chex.assert_trees_all_equal(after.params, state.params)


@pytest.mark.parametrize(("method", "kind"), [("sync", "looped"), ("ccl_sc", "unrolled")])
def test_without_batch_norm_microbatches_change_nothing(method, kind, monkeypatch):
    """The objectives are no means of the parts' objectives, and yet are those of the whole batch.

    An accelerator loops over the parts, a CPU does not.
    """
    if kind == "looped":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    parts, state = setting(method), initial_state(method)
    frozen = FrozenNorm(parts["network"])
    step = functools.partial(train_step, **parts | {"network": frozen})
    batch = make_batch(masked=(0, 4, 8, 1))
    compiled = jax.jit(step)
    whole = compiled(state, batch)
    split = jax.jit(functools.partial(step, microbatches=4))(state, batch)
    chex.assert_trees_all_close(whole, split, rtol=1e-4, atol=1e-6)
    # Negative control: the mean of the parts' objectives, which accumulated gradients would give.
    if method == "sync":
        means = np.mean(
            [compiled(state, {k: v[i::4] for k, v in batch.items()})[1]["loss"] for i in range(4)]
        )
        assert abs(means - whole[1]["loss"]) > 1e-3 * whole[1]["loss"]


class FrozenNorm(nn.Module):
    """A network whose BatchNorm uses the running statistics, in training too."""

    network: nn.Module

    def apply(self, variables, images, *, train, mutable=(), rngs=None):
        del train, rngs
        outputs = self.network.apply(variables, images, train=False)
        # Any of the right shape will do; ccl_sc reads them.
        outputs["features"] = jnp.tile(outputs["logits"], 3)[:, :8] ** 2
        return outputs, {"batch_stats": variables["batch_stats"]}


def test_batch_norm_sees_one_microbatch_after_the_other_on_any_devices():
    batch, (state, step) = make_batch(), linear(norm=True, microbatches=2)
    results = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        split = sharding.batch_sharding(mesh)
        compiled = jax.jit(step, in_shardings=(sharding.replicated(mesh), split))
        results.append(jax.device_get(compiled(state, batch)))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
    stats = state.batch_stats
    for i in range(2):
        _, updated = Linear(norm=True).apply(
            {"params": state.params, "batch_stats": stats},
            batch["image"][i::2],
            train=True,
            mutable=["batch_stats"],
        )
        stats = updated["batch_stats"]
    chex.assert_trees_all_close(results[0][0].batch_stats, stats, rtol=1e-5, atol=1e-7)


def test_several_steps_learn():
    step = compiled_step("sync", 1)
    state, batch = initial_state("sync"), make_batch()
    losses, accuracies = [], []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        accuracies.append(float(metrics["accuracy"]))
    assert int(state.step) == 40
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert np.mean(accuracies[-5:]) > 0.9


# --- Masks ----------------------------------------------------------------------------------------


def test_labels_of_masked_examples_do_not_matter():
    batch = make_batch(masked=(1, 9, 15))
    changed = batch | {"label": np.where(batch["mask"] > 0, batch["label"], 0).astype(np.int32)}
    assert not np.array_equal(changed["label"], batch["label"])
    step, state = compiled_step("sync", 1), initial_state("sync")
    chex.assert_trees_all_equal(step(state, batch), step(state, changed))


def test_a_masked_batch_is_the_smaller_batch():
    """Of a network without BatchNorm, whose statistics see every image."""
    state, step = linear()
    step = jax.jit(step)
    batch = make_batch(masked=(1, 9, 15))
    batch["image"][[1, 9, 15]] = 100.0
    real = batch["mask"] > 0
    chex.assert_trees_all_close(
        step(state, batch), step(state, {k: v[real] for k, v in batch.items()}), rtol=1e-5
    )


def test_nothing_but_masked_examples_is_finite():
    state, metrics = run("sync", 1, masked=range(16))
    chex.assert_tree_all_finite((state, metrics))
    assert metrics["gradient_norm"] == 0.0
    assert metrics["accuracy"] == 0.0


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masked", [(), (3, 8), (0, 1, 2, 3, 6)], ids=["no mask", "mask", "empty shards"]
)
def test_eight_devices_do_what_one_does(masked):
    """The same loss, terms, parameters, BatchNorm statistics and momentum."""
    one, eight = run("sync", 1, masked=masked), run("sync", 8, masked=masked)
    for array in jax.tree.leaves(eight):
        assert len(array.sharding.device_set) == 8
        assert array.sharding.is_fully_replicated
    chex.assert_trees_all_close(eight, one, rtol=1e-5, atol=1e-6)


def distance(first, second):
    differences = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), first, second)
    return max(jax.tree.leaves(differences))


def per_shard(batch, function):
    """Averages what a function gives for each of eight shards: what pmap and pmean would do."""
    shards = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, 16, 2)]
    results = [function(shard) for shard in shards]
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *results)


def test_batch_norm_of_a_shard_would_be_noticed():
    """Negative control: the two tests above are not blind."""
    state = initial_state("sync")
    step = jax.jit(functools.partial(train_step, **setting("sync")))
    new, metrics = run("sync", 1)
    wrong_new, wrong = per_shard(make_batch(), lambda shard: step(state, shard))
    assert abs(wrong["loss"] - metrics["loss"]) > 0.01 * metrics["loss"]
    assert distance(wrong_new.params, new.params) > 1e-3


def test_means_of_shards_would_be_noticed():
    """Negative control: global BatchNorm, but a mean of the shards' means under an uneven mask."""
    batch = make_batch(masked=(0, 1, 2, 6))
    state, parts = initial_state("sync"), setting("sync")
    outputs = compiled_forward("sync")(state, batch["image"])

    def objective(shard):
        return parts["objective"](shard["outputs"], shard, {}, state.step, None)[0]

    expected = objective(batch | {"outputs": outputs})
    flat = {"label": batch["label"], "mask": batch["mask"]} | outputs

    def of_shard(shard):
        return objective(shard | {"outputs": {name: shard[name] for name in outputs}})

    wrong = per_shard(flat, of_shard)
    np.testing.assert_allclose(
        compiled_step("sync", 8)(state, batch)[1]["loss"], expected, rtol=1e-5
    )
    assert abs(wrong - expected) > 0.01 * expected


@pytest.mark.parametrize("changes", [
    {"risk_weight": "rank", "prior_source": "margin", "target_coverage": 0.1},
    {"risk_weight": "equal", "prior_source": "shuffled", "prior_weight": 1.0},
])  # fmt: skip
def test_ranks_and_shuffled_priors_are_of_the_whole_batch(changes):
    """Over eight devices as on one, and unlike the mean over shards."""
    rng, batch = np.random.default_rng(0), make_batch(masked=(1, 6))
    outputs = {
        "logits": rng.standard_normal((16, CLASSES)) * np.linspace(0.3, 3.0, 16)[:, None],
        "selection_logits": rng.standard_normal(16),
        "auxiliary_logits": rng.standard_normal((16, CLASSES)),
    }
    flat = {k: x.astype(np.float32) for k, x in outputs.items()}
    flat |= {"label": batch["label"], "mask": batch["mask"]}

    options = {"target_coverage": 0.8, "alpha": 1.0} | changes

    @jax.jit
    def of(flat):
        heads = (flat[name] for name in outputs)
        return sync_loss(*heads, flat["label"], mask=flat["mask"], **options)

    mesh = sharding.make_mesh(jax.devices()[:8])
    one = of(flat)
    chex.assert_trees_all_close(
        of(jax.device_put(flat, sharding.batch_sharding(mesh))), one, rtol=1e-5
    )
    assert abs(per_shard(flat, of)[0] - one[0]) > 0.01 * one[0]


# --- Second augmentation --------------------------------------------------------------------------


def test_a_second_image_gives_logits_that_are_constants():
    """Second logits are of the network before the step, and change no gradient or statistic."""

    def objective(outputs, batch, memory, step, trained):
        loss, terms, memory = plain_objective(outputs, batch, memory, step, trained)
        if "second_logits" not in outputs:
            return loss, terms, memory
        second = jnp.sum(outputs["second_logits"] ** 2)
        return loss + second, terms | {"second": second}, memory

    state, step = linear(norm=True, objective=objective)
    batch, other = make_batch(), make_batch(seed=1)
    alone, _ = jax.jit(step)(state, batch)
    both, metrics = jax.jit(step)(state, batch | {"second_image": other["image"]})
    chex.assert_trees_all_close(both, alone, rtol=1e-6, atol=1e-7)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    expected, _ = Linear(norm=True).apply(
        variables, other["image"], train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(metrics["second"], np.sum(expected["logits"] ** 2), rtol=1e-5)


# --- Averages -------------------------------------------------------------------------------------


def test_evaluation_uses_averages_that_follow_closely_at_first():
    """Parameters and statistics by hand; a step that is not finite leaves them."""
    state, step = linear(norm=True, averaged=True, average_decay=0.1)
    step = jax.jit(step)
    expected = None
    for t, decay in enumerate([0, 1 / 11, 0.1, 0.1]):  # 2 / 12 is more than 0.1
        state, _ = step(state, make_batch(seed=t))
        now = jax.device_get((state.params, state.batch_stats))
        if expected is not None:
            now = jax.tree.map(lambda new, old, d=decay: d * old + (1 - d) * new, now, expected)
        expected = now
        chex.assert_trees_all_close(state.opt_state[1:], expected, rtol=1e-5)
    bad = make_batch()
    bad["image"][3] = np.nan
    chex.assert_trees_all_equal(step(state, bad)[0].opt_state, state.opt_state)
    images = make_batch()["image"]
    found = eval_step(state, images, network=Linear(norm=True))["logits"]
    averaged = state.replace(params=expected[0], batch_stats=expected[1], opt_state=())
    for other, same in ((averaged, True), (state.replace(opt_state=()), False)):
        logits = eval_step(other, images, network=Linear(norm=True))["logits"]
        assert np.allclose(found, logits, rtol=1e-4, atol=1e-5) == same


# --- Memory ---------------------------------------------------------------------------------------


def test_targets_of_the_batchs_examples_are_updated_and_no_others_on_any_devices():
    """An example twice in a batch, as where it straddles two epochs, has the mean of its updates.

    The copies lie on different devices.
    """
    state, batch = initial_state("self_adaptive"), make_batch(masked=(3,))
    assert (state.memory == np.ones(TRAIN_SIZE)).all()
    batch["index"][13] = batch["index"][2]
    outputs = compiled_forward("self_adaptive")(state, batch["image"])
    right = np.array(jax.nn.softmax(outputs["logits"])[np.arange(16), batch["label"]])
    right[[2, 13]] = right[[2, 13]].mean()
    expected = np.ones(TRAIN_SIZE)
    expected[batch["index"]] = np.where(batch["mask"] > 0, 0.9 + 0.1 * right, 1.0)
    assert (expected < 1).sum() == 14
    for devices in (1, 8):
        new, _ = compiled_step("self_adaptive", devices)(state, batch)
        np.testing.assert_allclose(new.memory, expected, rtol=1e-6)


def test_the_queues_hold_the_momentum_encoders_keys_in_order_on_any_devices():
    """Three batches of 16 through queues of 10; an independent ring; a masked example."""
    state, queues = initial_state("ccl_sc"), {True: [], False: []}
    states = {1: state, 8: state}
    for step in range(3):
        batch, before = make_batch(seed=step, masked=(3,)), states[1]
        encoder = jax.tree.map(
            lambda slow, fast: 0.999 * slow + 0.001 * fast, before.memory["encoder"], before.params
        )
        outputs = compiled_forward("ccl_sc")(before.replace(params=encoder), batch["image"])
        keys = outputs["features"] / np.linalg.norm(outputs["features"], axis=1, keepdims=True)
        predicted = np.argmax(outputs["logits"], axis=1)
        for i in range(16):
            if batch["mask"][i]:
                queues[bool(predicted[i] == batch["label"][i])].append((keys[i], predicted[i]))
        states = {
            n: jax.device_get(compiled_step("ccl_sc", n)(states[n], batch)[0]) for n in (1, 8)
        }
        chex.assert_trees_all_close(states[1].memory, states[8].memory, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(states[1].memory["encoder"], encoder, rtol=1e-5, atol=1e-7)
    assert all(len(queue) > 10 for queue in queues.values()), "both have wrapped"
    for right, name in ((True, "correct"), (False, "error")):
        memory = states[1].memory[name]
        assert memory["next"] == len(queues[right]) % 10
        for k in range(len(queues[right]) - 10, len(queues[right])):
            key, predicted = queues[right][k]
            np.testing.assert_allclose(memory["keys"][k % 10], key, rtol=1e-4, atol=1e-5)
            assert memory["classes"][k % 10] == predicted


# --- Evaluation -----------------------------------------------------------------------------------


def test_evaluation_uses_the_running_statistics():
    state, _ = run("sync", 1)
    images = make_batch()["image"]
    evaluate = jax.jit(functools.partial(eval_step, network=setting("sync")["network"]))
    outputs = evaluate(state, images)
    assert outputs.keys() == {"logits", "selection_logits", "auxiliary_logits"}
    chex.assert_type(list(outputs.values()), jnp.float32)
    # An example's outputs do not depend on the rest of the batch.
    others = np.concatenate([images[:3], 2 * images[3:] + 1])
    alone = {name: x[:3] for name, x in evaluate(state, others).items()}
    chex.assert_trees_all_close(
        alone, {name: x[:3] for name, x in outputs.items()}, rtol=1e-5, atol=1e-6
    )
    # But they depend on the statistics.
    other = state.replace(batch_stats=jax.tree.map(lambda x: x + 1, state.batch_stats))
    assert not np.allclose(evaluate(other, images)["logits"], outputs["logits"])
