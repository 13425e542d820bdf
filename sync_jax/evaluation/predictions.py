"""A network's outputs on a split, as they are saved; needs no JAX."""

import dataclasses
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sync_jax.errors import InputError
from sync_jax.runtime.files import write_atomically
from sync_jax.scores import SCORES, Score, softmax


class Ranked(NamedTuple):
    """A split's examples under one confidence score."""

    confidence: np.ndarray  # [n] float64
    wrong: np.ndarray  # [n] float64, 1 where the prediction is not the label
    predicted: np.ndarray  # [n] integers, the predicted class
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A network's outputs on a split, a row per example.

    Attributes:
        outputs: float32, by name: logits `[n, classes]`, and with the heads selection_logits `[n]`,
            auxiliary_logits `[n, classes]`, abstention_logits `[n]`, or with dropout samples
            expected_entropy `[n]`.
        labels: `[n]` int32.
        index: `[n]` int64, positions in the official split.
    """

    outputs: dict[str, np.ndarray]
    labels: np.ndarray
    index: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """`[n]` integers, the most probable class."""
        return np.argmax(self.outputs["logits"], axis=-1)

    @property
    def wrong(self) -> np.ndarray:
        """`[n]` float64, 1 where the prediction is not the label."""
        return (self.predicted != self.labels).astype(np.float64)

    @property
    def probabilities(self) -> np.ndarray:
        """`[n, classes]` float64: in float32 a confident mistake would have probability 0."""
        return softmax(self.outputs["logits"].astype(np.float64))

    def confidence(self, score: str | Score, **parameters: Any) -> np.ndarray:
        """Confidence `[n]` float64, which keeps confident examples apart.

        Args:
            score: one, or its name in `scores.SCORES`.
            **parameters: the score's own arguments.
        """
        outputs = {name: output.astype(np.float64) for name, output in self.outputs.items()}
        known = SCORES[score] if isinstance(score, str) else score
        return known.function(outputs, **parameters)

    def ranked(self, score: str | Score, **parameters: Any) -> Ranked:
        """The examples under a score; see `confidence`."""
        confidence = self.confidence(score, **parameters)
        return Ranked(confidence, self.wrong, self.predicted, self.outputs["logits"].shape[-1])

    def same_examples(self, other: "Predictions") -> bool:
        """Whether both are of the same examples in the same order."""
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
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Reads what `save` wrote.

        Raises:
            InputError: there is no such file, or it is damaged.
        """
        try:
            contents = io.BytesIO(path.read_bytes())  # np.load would leave a damaged file open
            with np.load(contents, allow_pickle=False) as file:
                if any(member.compress_size < member.file_size for member in file.zip.infolist()):
                    raise ValueError("it is compressed")  # it could expand without end
                arrays = dict(file)
            outputs = {
                name.removeprefix("outputs/"): array
                for name, array in arrays.items()
                if name.startswith("outputs/")
            }
            if "logits" not in outputs or len({len(array) for array in arrays.values()}) > 1:
                raise ValueError("arrays are missing or of different lengths")
            _check(outputs, arrays["labels"], arrays["index"])
            return cls(outputs, arrays["labels"], arrays["index"])
        except FileNotFoundError:
            raise InputError(f"{path} is missing: train the run to its end first") from None
        except Exception as error:  # zipfile and NumPy raise almost anything on a damaged file
            raise InputError(f"{path} is damaged: {error}") from error


def _check(outputs: dict[str, np.ndarray], labels: np.ndarray, index: np.ndarray) -> None:
    """Raises ValueError where these can be no `Predictions`."""
    classes = outputs["logits"].shape[-1]
    for name, output in outputs.items():
        shape = (len(labels), classes) if name in ("logits", "auxiliary_logits") else (len(labels),)
        if output.dtype.kind != "f" or output.shape != shape or not output.size:
            raise ValueError(f"{name} is {output.dtype} {output.shape}, no output of a network")
        if not np.all(np.isfinite(output)):
            raise ValueError(f"{name} holds a number that is not finite")
    for name, array in {"labels": labels, "index": index}.items():
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected integers [n]")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, of {classes} classes")
