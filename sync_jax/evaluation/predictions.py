"""A network's outputs on a split, as they are made, saved and read."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sync_jax import guarantees
from sync_jax.data.splits import Part
from sync_jax.errors import InputError
from sync_jax.runtime.files import write_atomically, write_text
from sync_jax.scores import SCORES, Score, deployed_confidence, softmax


class Ranked(NamedTuple):
    """A split's examples under one confidence score."""

    confidence: np.ndarray  # [n] float64; float32 where a threshold is compared with it
    wrong: np.ndarray  # [n] float64, 1 where the prediction is not the label
    predicted: np.ndarray  # [n] integers, the predicted class
    num_classes: int
    groups: np.ndarray | None = None  # [n] integers; None: the examples are independent

    def independent(self) -> "Ranked":
        """One example of each group, for certificates: see `guarantees.one_per_group`."""
        if self.groups is None:
            return self
        rows = guarantees.one_per_group(self.groups)
        return Ranked(
            self.confidence[rows], self.wrong[rows], self.predicted[rows], self.num_classes
        )


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A network's outputs on a split, a row per example."""

    outputs: dict[str, np.ndarray]  # float32, as `SelectiveNetwork` returns them
    labels: np.ndarray  # [n] int32
    index: np.ndarray  # [n] int64, positions in the official split
    groups: np.ndarray | None = None  # [n] integers, equal for examples that depend on each other

    @property
    def predicted(self) -> np.ndarray:
        """`[n]` integers, the most probable class."""
        return np.argmax(self.outputs["logits"], axis=-1)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.outputs["logits"].shape[-1])

    @property
    def wrong(self) -> np.ndarray:
        """`[n]` float64, 1 where the prediction is not the label."""
        return (self.predicted != self.labels).astype(np.float64)

    @property
    def probabilities(self) -> np.ndarray:
        """`[n, classes]` float64: in float32 a confident mistake would have probability 0."""
        return softmax(self.outputs["logits"].astype(np.float64))

    def confidence(self, score: str | Score, **parameters: Any) -> np.ndarray:
        """Confidence `[n]` by a score, or its name in SCORES; float64 keeps the confident apart."""
        outputs = {name: output.astype(np.float64) for name, output in self.outputs.items()}
        known = SCORES[score] if isinstance(score, str) else score
        return known.function(outputs, **parameters)

    def ranked(self, score: str | Score, **parameters: Any) -> Ranked:
        """The examples under a score; see `confidence`."""
        confidence = self.confidence(score, **parameters)
        return Ranked(confidence, self.wrong, self.predicted, self.num_classes, self.groups)

    def decided(self, score: Score, **parameters: Any) -> Ranked:
        """The examples as a threshold sees them: by the score's unsaturated form, in float32.

        Thresholds then separate only examples that float32 separates.
        """
        confidence = deployed_confidence(score, self.outputs, **parameters)
        return Ranked(confidence, self.wrong, self.predicted, self.num_classes, self.groups)

    def same_examples(self, other: "Predictions") -> bool:
        """True where both are of the same examples in the same order."""
        return np.array_equal(self.index, other.index) and np.array_equal(self.labels, other.labels)

    @property
    def mean_selection(self) -> float | None:
        """Mean of the selection function g; None without a selection head."""
        has_head = "selection_logits" in self.outputs
        return float(self.confidence("selection").mean()) if has_head else None

    def save(self, path: Path) -> None:
        """Writes an .npz file, complete or not at all."""
        outputs = {f"outputs/{name}": output for name, output in self.outputs.items()}
        arrays: dict[str, Any] = {"labels": self.labels, "index": self.index, **outputs}
        if self.groups is not None:
            arrays["groups"] = self.groups
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Reads what `save` wrote; raises InputError if there is no such file, or it is damaged."""
        again = "; give the training command again: a finished run only predicts again"
        try:
            contents = io.BytesIO(path.read_bytes())  # np.load would leave a damaged file open
            with np.load(contents, allow_pickle=False) as file:
                if any(member.compress_size < member.file_size for member in file.zip.infolist()):
                    raise ValueError("it is compressed")  # it could expand without end
                arrays = dict(file)
            prefix = "outputs/"
            outputs = {
                name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)
            }
            if "logits" not in outputs or len({len(array) for array in arrays.values()}) > 1:
                raise ValueError("arrays are missing or of different lengths")
            rows = {x: arrays[x] for x in ("labels", "index", "groups") if x in arrays}
            _check(outputs, rows)
            return cls(outputs, **rows)
        except FileNotFoundError:
            raise InputError(f"{path} is missing{again}") from None
        except Exception as error:  # zipfile and NumPy raise almost anything on a damaged file
            raise InputError(f"{path} is damaged: {error}{again}") from error


def write_examples(
    path: Path,
    splits: Mapping[str, tuple[Predictions, np.ndarray | None]],
    class_names: Sequence[str],
) -> None:
    """Writes a CSV that says which example each row of predictions_*.npz is.

    `splits` has, by name, the predictions and the names of the official split's files, to which
    `Predictions.index` points; None where they have none.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("split", "row", "index", "file", "class"))
    for split, (predictions, files) in splits.items():
        pairs = zip(predictions.index, predictions.labels, strict=True)
        for row, (index, label) in enumerate(pairs):
            file = "" if files is None else files[index]
            writer.writerow((split, row, index, file, class_names[label]))
    write_text(path, text.getvalue())


def _check(outputs: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> None:
    """Raises ValueError where these can be no `Predictions`."""
    classes, labels = outputs["logits"].shape[-1], rows["labels"]
    for name, output in outputs.items():
        shape = (len(labels), classes) if name in ("logits", "auxiliary_logits") else (len(labels),)
        if output.dtype.kind != "f" or output.shape != shape or not output.size:
            raise ValueError(f"{name} is {output.dtype} {output.shape}, no output of a network")
        if not np.all(np.isfinite(output)):
            raise ValueError(f"{name} holds a number that is not finite")
    for name, array in rows.items():
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected integers [n]")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, of {classes} classes")


def predict(
    part: Part,
    outputs_of: Callable[[np.ndarray], dict[str, Any]],
    batch_size: int,
    *,
    share: slice | None = None,
) -> Predictions:
    """Outputs for every example exactly once, whatever the batch size.

    `outputs_of` maps images `[batch_size, ...]`, or the `share` of their rows that this process
    has, to arrays `[batch_size, ...]`. The last batch is filled up with zeros.
    """
    import jax  # here, as reading and judging predictions needs none

    size = len(part.labels)
    if size == 0:
        raise InputError("there are no examples to predict")
    rows: list[dict[str, np.ndarray]] = []
    pending: dict[str, Any] | None = None
    first, last, _ = (share or slice(None)).indices(batch_size)
    for start in range(0, size, batch_size):
        images = part.images[min(start + first, size) : min(start + last, size)]
        padding = last - first - len(images)
        if padding:
            images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
        following = outputs_of(images)
        if pending is not None:  # fetched while the device works on the next
            rows.append(jax.device_get(pending))
        pending = following
    rows.append(jax.device_get(pending))
    outputs = {
        name: np.concatenate([row[name] for row in rows])[:size].astype(np.float32)
        for name in rows[0]
    }
    return Predictions(outputs, part.labels, part.index, part.groups)
