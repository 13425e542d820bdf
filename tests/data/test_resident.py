import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_jax.data import resident
from sync_jax.data.augmentation import Augmentation
from sync_jax.data.resident import (
    ResidentSplit,
    epoch_index,
    shuffle_constants,
    shuffled,
    training_batch,
)

PLAIN = Augmentation(crop_padding=0, flip=False)
FULL = Augmentation(crop_padding=1, flip=True)


def indices(seed, first, steps, *, batch_size, size):
    """`[steps, batch_size]` of consecutive steps, as training would see them."""
    seen = _compiled_indices(batch_size)(jax.random.key(seed), first + jnp.arange(64), size)
    return np.asarray(seen)[:steps]


@functools.cache
def _compiled_indices(batch_size):
    one = functools.partial(epoch_index, batch_size=batch_size)
    return jax.jit(jax.vmap(lambda key, step, size: one(key, step, size=size), (None, 0, None)))


def make_split(size=40):
    """Each image's pixels tell which example it is."""
    images = np.zeros((size, 4, 5, 1), np.uint8)
    images += np.arange(size, dtype=np.uint8)[:, None, None, None] + 1
    images[:, :, 0] += 100  # so that a flip can be seen
    return ResidentSplit(jnp.asarray(images), jnp.arange(size, dtype=jnp.int32) * 7 % 5)


# --- Epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch_size"), [
    (1, 1), (10, 10), (97, 10),
])  # fmt: skip
def test_each_epoch_is_a_permutation(size, batch_size):
    """Also where batches straddle epochs: no example is left out at an epoch's end."""
    epochs = 3
    steps = -(-epochs * size // batch_size)
    seen = indices(0, 0, steps, batch_size=batch_size, size=size).reshape(-1)
    for epoch in seen[: epochs * size].reshape(epochs, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_a_late_epoch_is_a_permutation():
    """Positions close to the documented limit of 2^32."""
    size, batch_size = 13, 10
    epoch = (2**32 - 1) // size - 2
    first = epoch * size // batch_size
    seen = indices(0, first, 5, batch_size=batch_size, size=size).reshape(-1)
    begin = epoch * size - first * batch_size
    np.testing.assert_array_equal(np.sort(seen[begin : begin + size]), np.arange(size))


def test_shuffled_is_a_permutation_of_every_size():
    constants = shuffle_constants(jax.random.key(3))
    places = jnp.arange(300, dtype=jnp.uint32)
    shuffle = jax.jit(lambda size: shuffled(places % size, constants, size))
    for size in range(1, 301):
        result = shuffle(jnp.uint32(size))
        chex.assert_type(result, jnp.uint32)
        result = np.asarray(result)[:size]
        np.testing.assert_array_equal(np.sort(result), np.arange(size))


def test_epochs_and_seeds_are_unrelated():
    """Two random permutations of 50 agree in one place on average; these 276 pairs in about 276."""
    batches = [indices(seed, 0, 30, batch_size=10, size=50) for seed in range(4)]
    orders = np.stack(batches).reshape(24, 50)
    assert len({tuple(order) for order in orders} | {tuple(range(50))}) == 25
    agreements = [np.sum(orders[i] == orders[j]) for i in range(24) for j in range(i)]
    assert abs(np.sum(agreements) - 276) < 4 * np.sqrt(276)


# --- Is it random? --------------------------------------------------------------------------------


NUMBER = 24_000


def shuffles(size):
    """`[NUMBER, size]`, each row another key's permutation."""
    return np.asarray(_compiled_shuffles(resident.ROUNDS)(size))[:, :size]


@functools.cache
def _compiled_shuffles(rounds):  # `rounds` so that a changed ROUNDS compiles anew
    keys = jax.random.split(jax.random.key(0), NUMBER)
    places = jnp.arange(31, dtype=jnp.uint32)

    @jax.jit
    def make(size):
        constants = jax.vmap(shuffle_constants)(keys)
        assert constants.shape == (NUMBER, rounds, 2)
        return jax.vmap(lambda c: shuffled(places % jnp.uint32(size), c, size))(constants)

    return make


def uniformity_of_positions(size):
    """p-value of each place going to each value equally often."""
    values = shuffles(size)
    counts = np.stack([np.bincount(values[:, place], minlength=size) for place in range(size)])
    # Rows and columns both sum to NUMBER: (size - 1)^2 degrees of freedom.
    statistic = np.sum((counts - NUMBER / size) ** 2) / (NUMBER / size)
    return scipy.stats.chi2.sf(statistic * (size - 1) / size, (size - 1) ** 2)


def uniformity_of_orders(size):
    """p-value of all orders being equally frequent."""
    _, counts = np.unique(shuffles(size), axis=0, return_counts=True)
    expected = NUMBER / scipy.special.factorial(size)
    missing = scipy.special.factorial(size) - len(counts)
    statistic = np.sum((counts - expected) ** 2) / expected + missing * expected
    return scipy.stats.chi2.sf(statistic, scipy.special.factorial(size) - 1)


def test_positions_and_orders_are_uniform():
    for size in (2, 7, 16, 31):
        assert uniformity_of_positions(size) > 0.01, size
    for size in (3, 4, 5):
        assert uniformity_of_orders(size) > 0.01, size


def test_too_few_rounds_would_be_noticed(monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(resident, "ROUNDS", 4)
    assert uniformity_of_positions(16) < 1e-6


# --- The batch ------------------------------------------------------------------------------------


def test_shapes_dtypes_and_the_images_of_the_index():
    split = make_split()
    for step in (0, 1, 2):  # step 2 straddles two epochs
        batch = compiled_batch(PLAIN)(split, jnp.uint32(0), jnp.int32(step))
        assert batch.keys() == {"image", "label", "index", "mask"}
        chex.assert_shape(batch["image"], (16, 4, 5, 1))
        chex.assert_shape([batch["label"], batch["index"], batch["mask"]], (16,))
        chex.assert_type([batch["image"], batch["mask"]], jnp.float32)
        chex.assert_type([batch["label"], batch["index"]], jnp.int32)
        np.testing.assert_array_equal(batch["mask"], 1.0)
        np.testing.assert_array_equal(batch["image"], split.images[batch["index"]])
        np.testing.assert_array_equal(batch["label"], split.labels[batch["index"]])
        full = compiled_batch(FULL)(split, jnp.uint32(0), jnp.int32(step))
        np.testing.assert_array_equal(full["index"], batch["index"])
        assert not np.array_equal(full["image"], batch["image"])


@functools.cache
def compiled_batch(augmentation):
    return jax.jit(functools.partial(training_batch, batch_size=16, augmentation=augmentation))


@given(seed=st.integers(0, 2**31 - 1), step=st.integers(0, 2**27))
@settings(max_examples=20)
def test_batch_is_a_function_of_seed_and_step(seed, step):
    """Asked for again, and after other steps, it is the same bit for bit: so a run can resume."""
    split, make = make_split(), compiled_batch(FULL)
    batch = make(split, jnp.uint32(seed), jnp.int32(step))
    following = make(split, jnp.uint32(seed), jnp.int32(step + 1))
    other = make(split, jnp.uint32(seed + 1), jnp.int32(step))
    chex.assert_trees_all_equal(make(split, jnp.uint32(seed), jnp.int32(step)), batch)
    for different in (following, other):
        assert not np.array_equal(different["index"], batch["index"])


def test_augmentation_differs_between_steps_and_seeds():
    """One example, so that only the augmentation can make a difference: 16 steps, 18 outcomes."""
    split = ResidentSplit(make_split().images[:1], jnp.zeros(1, jnp.int32))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def images(seed, step):
        return training_batch(split, seed, step, batch_size=1, augmentation=FULL)["image"]

    steps = jnp.arange(16)
    first, second = images(jnp.uint32(0), steps), images(jnp.uint32(1), steps)
    assert len({image.tobytes() for image in np.asarray(first)}) > 5
    assert not np.array_equal(first, second)
