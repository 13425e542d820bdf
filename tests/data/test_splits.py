import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_jax.data.splits import fold_sizes, fold_split, parse_fold, stratified_split
from sync_jax.errors import InputError


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**70),
)
def test_is_a_stratified_partition(labels, fraction, seed):
    labels = np.array(labels)
    holdout = round(fraction * len(labels))
    kept, held_out = stratified_split(labels, holdout=holdout, seed=seed)
    assert len(held_out) == holdout
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(len(labels)))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held_out) > 0).all()
    for label in np.unique(labels):
        share = holdout * np.mean(labels == label)
        assert abs(np.sum(labels[held_out] == label) - share) < 1


def test_gives_the_rest_to_the_largest_remainders():
    # Shares of 4 are 0.4, 1.2 and 2.4: rounded down 0, 1 and 2; one is left. Of the two largest
    # remainders, 0.4 each, the smaller label's counts.
    labels = np.repeat([7, 2, 9], [1, 3, 6])
    _, held_out = stratified_split(labels, holdout=4, seed=0)
    assert [np.sum(labels[held_out] == label) for label in (7, 2, 9)] == [1, 1, 2]


def test_depends_on_the_seed_and_on_nothing_else():
    labels = np.tile(np.arange(10), 20)
    first = stratified_split(labels, holdout=50, seed=1)[1]
    np.random.seed(0)  # noqa: NPY002 - global state must not matter
    again = stratified_split(labels.astype(np.uint8), holdout=50, seed=1)[1]
    other = stratified_split(labels, holdout=50, seed=2)[1]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_stays_what_it_was():
    """Models on disk were calibrated on this split: a change of these numbers is a bug."""
    _, held_out = stratified_split(np.tile([0, 1, 2], 10), holdout=6, seed=0)
    assert held_out.tolist() == [1, 3, 11, 13, 20, 21]


def test_every_example_is_as_likely_to_be_held_out():
    labels = np.repeat([0, 1], [30, 10])
    counts = np.zeros(40)
    for seed in range(400):
        counts[stratified_split(labels, holdout=12, seed=seed)[1]] += 1
    # Each count is binomial(400, 0.3): mean 120, standard deviation 9.2.
    assert counts.sum() == 400 * 12
    assert np.abs(counts - 120).max() < 4 * 9.2


@given(labels=st.lists(st.integers(0, 3), min_size=8, max_size=60), count=st.integers(2, 6))
def test_folds_hold_every_example_once_and_are_stratified(labels, count):
    labels = np.array(labels)
    folds = [fold_split(labels, i + 1, count, seed=3) for i in range(count)]
    together = np.concatenate([held_out for _, held_out in folds])
    np.testing.assert_array_equal(np.sort(together), np.arange(len(labels)))
    for size, (kept, held_out) in zip(fold_sizes(len(labels), count), folds, strict=True):
        assert len(held_out) == size
        np.testing.assert_array_equal(
            np.sort(np.concatenate([kept, held_out])), np.arange(len(labels))
        )
        for label in np.unique(labels):
            # Each fold is a stratified part of what the ones before it left, within one of them.
            assert abs(np.sum(labels[held_out] == label) - np.mean(labels == label) * size) < 2


def test_the_name_of_a_fold():
    assert parse_fold("2/5") == (2, 5)
    for text in ("0/5", "6/5", "1/1", "2", "a/b", "-1/5", " 1/5"):
        with pytest.raises(InputError, match="such as '2/5'"):
            parse_fold(text)
