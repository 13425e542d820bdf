"""Predictions for any number of pictures, a batch at a time, into a table on the disk."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rich.console
import rich.progress

from sync_jax.data.images import BadImageError
from sync_jax.data.prepare.archives import is_picture
from sync_jax.data.preprocessing import Preprocessing
from sync_jax.errors import InputError
from sync_jax.evaluation.decision import Decision, Prediction
from sync_jax.runtime.console import printable

FORMATS = (".csv", ".jsonl", ".parquet")
BATCH = 256
_TOP = 5
_KEY = "key.json"
_UNREADABLE = "unreadable: "

Row = dict[str, Any]


class Classifier(Protocol):
    """The interface of `predictor.SelectiveClassifier` that is needed here."""

    preprocessing: Preprocessing
    decision: Decision
    source: str

    def predict(self, inputs: Any) -> Prediction:
        """Answers or abstains."""


@dataclasses.dataclass
class Summary:
    """Counts of the rows that `stream` has written."""

    rows: int = 0
    accepted: int = 0
    unreadable: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)  # the first ten unreadable ones
    resumed: int = 0  # rows that were there

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts a row."""
        self.rows += 1
        self.accepted += row["accepted"]
        if row["reason"].startswith(_UNREADABLE):
            self.unreadable += 1
            if len(self.examples) < 10:
                self.examples.append(f"{row['path']}: {row['reason']}")


def sources(given: Path) -> Iterator[tuple[str, Any]]:
    """Yields names and pictures: of a folder, of a list of paths in a .txt, or of an array in .npy.

    Of a folder by its sorted names, and of the folders in it; nothing is kept, so that a million
    pictures take no more memory than a thousand.
    """
    if given.is_dir():
        yield from ((os.fspath(path), path) for path in _below(given))
    elif given.suffix.lower() == ".npy":
        try:
            array = np.load(given, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"--input={given} cannot be read: {error}") from error
        yield from ((f"{given}[{i}]", np.asarray(array[i])) for i in range(len(array)))
    elif given.suffix.lower() == ".txt":
        try:
            with given.open() as lines:
                for line in lines:
                    if name := line.rstrip("\n"):
                        yield name, given.parent / name
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--input={given} cannot be read: {error}") from error
    elif is_picture(given.name) and given.is_file():
        yield os.fspath(given), given
    else:
        what = "is none of these" if given.exists() else "does not exist"
        raise InputError(
            f"--input={given} {what}: a folder of pictures, a picture, a list of paths (.txt), or "
            "an array (.npy)"
        )


def _below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _below(Path(entry.path))
        elif is_picture(entry.name) and entry.is_file():
            yield Path(entry.path)


def stream(
    classifier: Classifier,
    given: Path,
    output: Path,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Predicts all pictures of `sources(given)`, and writes a row for each.

    The rows go to a file beside `output`, which is renamed when all are done. The
    same call goes on with it, if the classifier and the first names are the same. A picture that
    cannot be read gets a row that says so.

    Args:
        classifier: a `SelectiveClassifier`.
        given: see `sources`.
        output: a .csv, .jsonl or .parquet.
        progress: called with the number of rows after each batch.

    Raises:
        InputError: the input or the output cannot be used.
    """
    if output.suffix.lower() not in FORMATS:
        raise InputError(f"--output={output} must end with one of {', '.join(FORMATS)}")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f"--output={output} cannot be written: it is a folder, or is in none")
    partial, key = _partial(output), Path(f"{output}.{_KEY}")
    known = json.dumps(_key(classifier, given), sort_keys=True)
    names = sources(given)
    first = next(names, None)
    if first is None:
        raise InputError(f"--input={given} holds no picture")
    names = itertools.chain([first], names)
    summary = None
    if partial.exists() and key.exists() and key.read_text() == known:
        summary = _resumed(partial, names)
    if summary is None:
        summary, names = Summary(), sources(given)
        partial.unlink(missing_ok=True)
        key.write_text(known)
    columns = _columns(classifier)
    with (
        _writer(partial, columns) as write,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        ThreadPoolExecutor(1) as ahead,
    ):
        parts = _batches(names)

        def prepare() -> list[tuple[str, np.ndarray | str]] | None:
            part = next(parts, None)
            if part is None:
                return None
            loaded = pool.map(lambda x: _loaded(classifier.preprocessing, x[1]), part)
            return [(name, image) for (name, _), image in zip(part, loaded, strict=True)]

        waiting = ahead.submit(prepare)
        while (batch := waiting.result()) is not None:
            waiting = ahead.submit(prepare)  # read while the network computes
            rows = _rows(classifier, batch)
            write(rows)
            for row in rows:
                summary.add(row)
            progress(summary.rows)
    if output.suffix.lower() == ".parquet":
        _to_parquet(partial, output, columns)
        partial.unlink()
    else:
        partial.replace(output)
    key.unlink()
    return summary


@contextlib.contextmanager
def counter() -> Iterator[Callable[[int], None]]:
    """A line on the terminal that counts rows, for `stream`; nothing in a file."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.completed:,.0f} predicted"),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done: bar.update(task, completed=done)


def _key(classifier: Classifier, given: Path) -> dict[str, Any]:
    """Identifies a prediction: a stopped one goes on only if all of this is the same."""
    decision = classifier.decision
    return {
        "source": classifier.source,
        "input": os.path.abspath(given),
        "calibration": decision.calibration_digest,
        "score": decision.score,
        "threshold": repr(decision.threshold),
    }


def _batches(names: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    names = iter(names)
    while part := list(itertools.islice(names, BATCH)):
        yield part


def _loaded(preprocessing: Preprocessing, source: Any) -> np.ndarray | str:
    """The input of one example, or why there is none."""
    try:
        if isinstance(source, Path):
            return preprocessing.picture(source)
        return preprocessing.batch(source[None])[0]
    except (BadImageError, InputError, ValueError, OSError) as error:
        return f"{_UNREADABLE}{error}"


def _columns(classifier: Classifier) -> list[str]:
    classes = classifier.decision.classes
    count = min(_TOP, _TOP if classes is None else len(classes))
    top = [f"{what}_{k}" for k in range(1, count + 1) for what in ("label", "probability")]
    return ["path", "label", "confidence", "accepted", "reason", "threshold", "certificate", *top]


def _rows(classifier: Classifier, batch: Sequence[tuple[str, np.ndarray | str]]) -> list[Row]:
    decision = classifier.decision
    good = [image for _, image in batch if not isinstance(image, str)]
    found = classifier.predict(np.stack(good)) if good else None
    rows, k = [], 0
    finite = np.isfinite(decision.threshold)  # it accepts nothing else
    shared = {
        "threshold": decision.threshold if finite else None,
        "certificate": decision.certificate,
    }
    columns = _columns(classifier)
    for name, image in batch:
        row: Row = dict.fromkeys(columns) | {"path": printable(name), **shared}
        if isinstance(image, str):
            row |= {"accepted": False, "reason": printable(image)}
        else:
            assert found is not None
            assert found.label is not None
            assert found.probabilities is not None
            accepted = bool(found.accepted[k])
            row |= {
                "label": _plain(found.label[k]),
                "confidence": float(found.confidence[k]),
                "accepted": accepted,
                "reason": "" if accepted else "confidence below the threshold",
            }
            count = (len(columns) - 7) // 2
            best = np.argsort(-found.probabilities[k], kind="stable")[:count]
            for rank, position in enumerate(best, start=1):
                label = position if decision.classes is None else decision.classes[position]
                row[f"label_{rank}"] = _plain(label)
                row[f"probability_{rank}"] = float(found.probabilities[k][position])
            k += 1
        rows.append(row)
    return rows


def _plain(label: Any) -> Any:
    value = label.item() if hasattr(label, "item") else label
    return printable(value) if isinstance(value, str) else value


def _partial(output: Path) -> Path:
    """Where rows go until all are done: CSV, or JSON lines for the other formats."""
    return Path(f"{output}.incomplete{'.csv' if output.suffix.lower() == '.csv' else '.jsonl'}")


@contextlib.contextmanager
def _writer(partial: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Appends rows."""
    with partial.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if partial.suffix == ".csv" and not file.tell():
            writer.writeheader()

        def write(rows: Sequence[Row]) -> None:
            if partial.suffix == ".csv":
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()

        yield write


def _resumed(partial: Path, names: Iterator[tuple[str, Any]]) -> Summary | None:
    """Counts the whole rows of a stopped prediction, and cuts off what follows them.

    Takes as many of `names`; None if they are others.
    """
    summary = Summary()
    with partial.open("rb") as file:
        header = file.readline() if partial.suffix == ".csv" else b""
        kept = len(header)
        for line in file if header.endswith(b"\n") or partial.suffix != ".csv" else ():
            try:
                if not line.endswith(b"\n"):
                    break
                if header:
                    text = io.StringIO((header + line).decode(), newline="")
                    row: dict[str, Any] = next(csv.DictReader(text))
                    row["accepted"] = row["accepted"] == "True"
                else:
                    row = json.loads(line)
            except (ValueError, StopIteration, csv.Error):
                break
            name = next(names, None)
            if name is None or printable(name[0]) != row["path"]:
                return None
            kept += len(line)
            summary.add(row)
    os.truncate(partial, kept)
    summary.resumed = summary.rows
    return summary if summary.rows else None


def _to_parquet(partial: Path, output: Path, columns: Sequence[str]) -> None:
    """Converts JSON lines, a batch at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"Parquet is written by pyarrow: pip install pyarrow ({error})") from error
    kinds = {
        "accepted": pyarrow.bool_(),
        "confidence": pyarrow.float64(),
        "threshold": pyarrow.float64(),
    }
    numbers = {x: pyarrow.float64() for x in columns if x.startswith("probability")}
    kinds |= numbers
    schema = pyarrow.schema([(x, kinds.get(x, pyarrow.string())) for x in columns])

    def typed(row: Row) -> Row:
        """Labels as text: those of a classifier may be numbers."""
        return {
            name: str(x) if name.startswith("label") and x is not None else x
            for name, x in row.items()
        }

    temporary = Path(f"{output}.writing")
    with partial.open() as lines, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        while part := list(itertools.islice(lines, 4096)):
            rows = [typed(json.loads(line)) for line in part]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    temporary.replace(output)
