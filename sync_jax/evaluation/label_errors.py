"""Examples whose label is probably wrong, from the predictions of networks that never saw them."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sync_jax.data.info import Images, few
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions
from sync_jax.runtime.files import write_text
from sync_jax.runtime.page import figures, page, paragraph

LIST, GALLERY = "label_errors.csv", "label_errors.html"
_SHOWN = 300  # of the most suspected


@dataclasses.dataclass(frozen=True)
class LabelErrors:
    """The suspected examples, the most suspected first; all arrays are `[suspected]`."""

    index: np.ndarray  # positions in the official training split
    label: np.ndarray
    suggested: np.ndarray  # the class that the networks find most probable
    quality: np.ndarray  # the probability of the label


def joined(folds: Sequence[Predictions]) -> Predictions:
    """The predictions of all folds, in the order of the training split."""
    index = np.concatenate([fold.index for fold in folds])
    order = np.argsort(index)
    outputs = {
        name: np.concatenate([fold.outputs[name] for fold in folds])[order]
        for name in folds[0].outputs
    }
    labels = np.concatenate([fold.labels for fold in folds])[order]
    return Predictions(outputs, labels, index[order])


def find_label_errors(predictions: Predictions) -> LabelErrors:
    """Finds probable label errors by confident learning (Northcutt et al., 2021), in cleanlab.

    The predictions must be of networks that were not trained on the examples.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise InputError(
            f"label errors are found by cleanlab: pip install 'sync_jax[labels]' ({error})"
        ) from error
    probabilities = predictions.probabilities
    found = find_label_issues(
        predictions.labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
    )
    label = predictions.labels[found]
    return LabelErrors(
        predictions.index[found],
        label,
        probabilities[found].argmax(axis=-1),
        probabilities[found, label],
    )


def write_label_errors(
    errors: LabelErrors,
    folder: Path,
    class_names: Sequence[str],
    files: np.ndarray | None,
) -> None:
    """Writes label_errors.csv: a line per suspected example; `files` are those of the split."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("index", "file", "label", "suggested", "probability_of_label"))
    for index, label, suggested, quality in zip(*dataclasses.astuple(errors), strict=True):
        file = files[index] if files is not None else ""
        writer.writerow((index, file, class_names[label], class_names[suggested], f"{quality:.6f}"))
    write_text(folder / LIST, text.getvalue())


def write_gallery(
    errors: LabelErrors,
    folder: Path,
    class_names: Sequence[str],
    images: Images,
    files: np.ndarray | None,
) -> None:
    """Writes label_errors.html, which shows the most suspected of the training split's `images`."""
    shown = []
    columns = (column[:_SHOWN] for column in dataclasses.astuple(errors))
    for index, label, suggested, quality in zip(*columns, strict=True):
        image = Image.fromarray(images[index : index + 1][0].squeeze())
        lines = (
            f"{class_names[label]} ({100 * quality:.2g} %)",
            f"suggested: {class_names[suggested]}",
            f"example {index}" if files is None else files[index],
        )
        shown.append((image, "\n".join(lines)))
    text = (
        f"{len(errors.index):,} labels are suspect; shown are {len(shown)}, the most suspect "
        "first. The percentage is the probability of the label."
    )
    title = "Labels that are probably wrong"
    write_text(folder / GALLERY, page(title, paragraph(text), figures(shown)))


def describe(errors: LabelErrors, total: int, class_names: Sequence[str]) -> str:
    """One line on how many, and the pairs of classes that are confused most."""
    pairs = [
        f"{class_names[label]} -> {class_names[suggested]}"
        for label, suggested in zip(errors.label, errors.suggested, strict=True)
    ]
    names, counts = np.unique(pairs, return_counts=True)
    most = [f"{names[i]} ({counts[i]})" for i in np.argsort(-counts, kind="stable")]
    share = 100 * len(errors.index) / total
    return f"{len(errors.index):,} of {total:,} labels ({share:.1f} %) are suspect: {few(most)}"
