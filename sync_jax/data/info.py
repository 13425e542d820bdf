"""What models and pipelines need to know of a dataset."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What models and pipelines need to know of a dataset.

    Attributes:
        name: as in `config.data.name`.
        num_classes: labels are 0 to num_classes - 1.
        image_shape: (height, width, channels).
        class_names: one for each label.
        mean: per channel, of the training pixels divided by 255.
        std: likewise the standard deviation.
        num_train: examples in the official training split.
        num_test: examples in the official test split.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_test: int
