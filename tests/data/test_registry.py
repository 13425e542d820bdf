"""Names and sections that fit no dataset, and sizes that do not fit a config."""

import numpy as np
import pytest

from sync_jax.config import default_config
from sync_jax.data import registry
from sync_jax.data.info import DatasetInfo
from sync_jax.data.loading import check_sizes
from sync_jax.errors import InputError


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "fashion_mist"}, "config.data.name='fashion_mist' is unknown (did you mean "
                                   "'fashion_mnist'?); choose from cifar10, cifar100, fashion_mn"),
        ({"name": ""}, "config.data.name='' is unknown; choose from "),
        ({"name": "tfds:../x"}, "config.data.name='tfds:../x' must be tfds:NAME, NAME/CONFIG or "),
        ({"name": "image_folder"}, "config.data.folder is empty; say --config.data.folder=FOLDER"),
        ({"name": "food101", "stored_size": 32},
         "config.data.image_size=64, stored_size=32 and short_side=32 must not decrease"),
    ],
)  # fmt: skip
def test_a_section_that_makes_no_dataset(changes, expected):
    section = default_config().data
    section.update(changes)
    assert refused(lambda: registry.dataset(section)).startswith(expected)


def test_every_name_makes_a_dataset_that_reads_nothing():
    for name, make in registry.DATASETS.items():
        section = default_config().data
        section.update({"name": name, "folder": "nowhere", "data_dir": "/nowhere/x"})
        dataset = registry.dataset(section)
        assert type(dataset) is make
        assert not dataset.is_prepared()


INFO = DatasetInfo("fashion_mnist", 10, (28, 28, 1), tuple("0123456789"), (0.3,), (0.4,), 60_000, 1)


def config(**changes):
    result = default_config()
    result.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return result


def test_sizes_that_do_not_fit():
    """Each limit, and one beyond it."""
    for good, bad, expected in (
        ({"data__calibration_size": 10}, {"data__calibration_size": 9}, "use 10 to 59990"),
        (
            {"data__calibration_size": 59_990, "train__batch_size": 1},
            {"data__calibration_size": 59_991},
            "config.data.calibration_size=59991: fashion_mnist has 60000 training examples of 10",
        ),
        (
            {"train__batch_size": 54_000},
            {"train__batch_size": 54_001},
            "config.train.batch_size=54001 is more than the 54000 training examples",
        ),
        (  # a size of 0 is a tenth
            {"data__calibration_size": 0, "train__batch_size": 54_000},
            {"data__calibration_size": 0, "train__batch_size": 54_001},
            "more than the 54000 training examples",
        ),
        (  # batches are a function of step * batch_size in 32 bits
            {"train__epochs": 39_768.0},
            {"train__epochs": 39_769.0},
            "config.train.epochs=39769 must be less than 39768 with 54000",
        ),
    ):
        check_sizes(config(**good), INFO)
        assert expected in refused(lambda bad=bad: check_sizes(config(**bad), INFO))


def test_what_an_example_takes():
    assert INFO.stored_shape == (28, 28, 1)
    assert INFO.bytes_per_example == 784
    features = DatasetInfo("x", 2, (7,), ("a", "b"), (0.0,) * 7, (1.0,) * 7, 9, 0, scale=1.0)
    assert features.bytes_per_example == 28
    assert np.prod(features.stored_shape) == 7
