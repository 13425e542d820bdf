"""The evidence on SYNC: every run of docs/evidence.md, kept compactly, and its tables.

    python -m benchmarks.evidence --list                             # cells and cost; runs nothing
    python -m benchmarks.evidence --cifar100=FOLDER --stage=family   # goes on where it was stopped
    python -m benchmarks.evidence --table                            # from what is kept

Several such commands at once share the cells: on two cores two processes, each bound to one, did
1.7 times as much as one. Stages run in their order, for later ones read what earlier ones found.

A cell is a setting, a row (a method with its options) and a seed. Of each the test errors and the
ranks of the test examples by each score are kept in benchmarks/results/evidence, from which every
number of the tables is computed.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.optimize import minimize_scalar

from benchmarks.step import describe_machine
from sync_jax import metrics, train
from sync_jax.config import default_config
from sync_jax.data import registry
from sync_jax.data.datasets.memory import MemoryDataset
from sync_jax.data.images import decode, square
from sync_jax.data.splits import load_test
from sync_jax.evaluation.comparison import combine
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import fit_parameters
from sync_jax.runtime import compilation_cache
from sync_jax.runtime.files import write_atomically
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.training_log import read_metrics
from sync_jax.scores import SCORES, softmax, softmax_response
from sync_jax.trainer import resolve

KEPT = Path("benchmarks/results/evidence")
COVERAGES = (90, 80, 70, 50)
TUNING_SEED, RESAMPLES = 100, 2000
Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data, network and schedule, the same for every row."""

    data: str
    epochs: float
    seconds: float  # of a run, on one core
    held_out: int = 5000
    seeds: int = 3  # in the main table
    per_class: int = 0  # training images; 0: all
    noise: str = ""  # "symmetric": 20 % of the labels are others; "human": a confusion matrix's
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FASHION = {"data.crop_padding": 1, "data.flip": True, "optimizer.learning_rate": 0.2}
_CIFAR = {"data.crop_padding": 4, "data.flip": True, "optimizer.learning_rate": 0.1}
_RESNET = _CIFAR | {"model.name": "resnet18", "model.width": 8}
_FASHION_MNIST = Setting("fashion_mnist", 7, 140, held_out=6000, config=_FASHION)
_FULL = Setting("cifar100", 12, 380, config=_CIFAR)
_FEW = Setting("cifar100", 60, 230, per_class=54, config=_CIFAR)
SETTINGS = {
    "few-54": _FEW,
    "full-12": _FULL,
    "fashion": _FASHION_MNIST,
    "few-20": dataclasses.replace(_FEW, epochs=100, per_class=20, seconds=150),
    "few-54-noise": dataclasses.replace(_FEW, noise="symmetric"),
    "few-54-human": dataclasses.replace(_FEW, noise="human"),
    "few-150": dataclasses.replace(_FEW, epochs=35, per_class=150, seconds=370, seeds=1),
    "fashion-noise": dataclasses.replace(_FASHION_MNIST, noise="symmetric", seeds=1),
    "full-12-noise": dataclasses.replace(_FULL, noise="symmetric", seeds=1),
    "few-54-resnet": dataclasses.replace(_FEW, epochs=40, seconds=800, seeds=1, config=_RESNET),
    "full-40": dataclasses.replace(_FULL, epochs=40, seconds=1250, seeds=1),
    "cars": Setting("cars", 40, 600, held_out=567, config=_CIFAR),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method with its options; of several members, the probabilities' mean, at one's cost."""

    method: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    members: int = 1


_CORRECTNESS = {"loss.sync_target": "correctness", "loss.coverage_weight": 0.0}
_POSTERIOR = _CORRECTNESS | {"loss.logit_prior": "fixed", "loss.detach_features": True}
_RANK = _POSTERIOR | {"loss.risk_weight": "rank"}
FAMILY = {
    "sync": Row("sync"),
    "control": Row("sync", _POSTERIOR | {"loss.risk_weight": "equal"}),
    "posterior": Row("sync", {"loss.logit_prior": "fixed", "loss.sync_target": "correctness"}),
    "posterior-unpenalised": Row("sync", _POSTERIOR | {"loss.logit_prior": "learnt"}),
    "posterior-learnt": Row(
        "sync", _POSTERIOR | {"loss.logit_prior": "learnt", "loss.risk_weight": "equal"}
    ),
    "value-1": Row("sync", {"loss.prior_weight": 1.0, "loss.prior_power": 1.0}),
    "value-3": Row("sync", {"loss.prior_weight": 1.0}),
    "value-1-posterior": Row(
        "sync",
        _POSTERIOR
        | {"loss.risk_weight": "equal", "loss.prior_weight": 1.0}
        | {"loss.prior_power": 1.0},
    ),
    **{f"rank-{c:g}": Row("sync", _RANK | {"target_coverage": c}) for c in (0.05, 0.2, 0.5, 0.8)},
    "rank-shuffled": Row(
        "sync", _RANK | {"target_coverage": 0.05, "loss.prior_source": "shuffled"}
    ),
    **{
        f"rank-{source}": Row(
            "sync", _RANK | {"target_coverage": 0.05, "loss.prior_source": source}
        )
        for source in ("auxiliary_head", "true_class", "margin", "average")
    },
    "rank-error": Row("sync", _RANK | {"loss.rank_floor": "error"}),
    "rank-agreement": Row(
        "sync", _RANK | {"target_coverage": 0.05, "loss.prior_source": "agreement", "loss.views": 2}
    ),
    "rank-running": Row("sync", _RANK | {"target_coverage": 0.05, "loss.rank_window": 2048}),
    "evidence-second-view": Row("sync", _RANK | {"target_coverage": 0.05, "loss.views": 2}),
    "evidence-held-out": Row("sync", _RANK | {"target_coverage": 0.05, "loss.evidence_share": 0.1}),
}
RIVALS = {
    "ce": Row("ce"),
    "selectivenet": Row("selectivenet"),
    "deep_gamblers": Row("deep_gamblers"),
    "self_adaptive": Row("self_adaptive"),
    "self_adaptive+em": Row("self_adaptive", {"loss.entropy_weight": 0.01}),
    "ccl_sc": Row("ccl_sc"),
    "mc_dropout": Row("mc_dropout", {"loss.dropout": 0.2}),
    "aurc": Row("aurc", {"warmup_share": 0.5}),
    "label_smoothing": Row("ce", {"loss.label_smoothing": 0.1}),
    "logit_norm": Row("ce", {"loss.logit_norm": 0.1}),
    "weight_decay": Row("ce", {"optimizer.weight_decay": 2e-3}),
    "weight_average": Row("ce", {"optimizer.average_decay": 0.999}),
    "ensemble": Row("ce", members=2),
}
ROWS = RIVALS | FAMILY
CONTROLS = ("control", "rank-shuffled")
# Beside its row's own config, every method is tried with two values of what its paper tunes.
_RATES: dict[str, Sequence[float]] = {"optimizer.learning_rate": (0.05, 0.2)}
TRIALS: dict[str, Mapping[str, Sequence[float]]] = {
    "ce": _RATES,
    "control": _RATES,
    "selectivenet": {"target_coverage": (0.5, 0.95)},
    "sync": {"loss.sync_weight": (0.1, 2.0)},
    "deep_gamblers": {"loss.payoff": (6.0, 15.0)},
    "self_adaptive": {"loss.target_momentum": (0.8, 0.99)},
    "ccl_sc": {"loss.contrast_weight": (0.3, 3.0)},
    "mc_dropout": {"loss.dropout": (0.1, 0.4)},
    "aurc": {"warmup_share": (0.25, 0.75)},
    "label_smoothing": {"loss.label_smoothing": (0.05, 0.2)},
    "logit_norm": {"loss.logit_norm": (0.05, 0.2)},
    "weight_decay": {"optimizer.weight_decay": (1e-3, 4e-3)},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    setting: str
    row: str
    seed: int
    trial: int = 0

    @property
    def name(self) -> str:
        """The name of its folder and its file."""
        trial = f"-trial{self.trial}" if self.trial else ""
        return f"{self.setting}/{self.row}{trial}-seed{self.seed}"

    @property
    def kept(self) -> Path:
        """The file of its ranks and errors."""
        return KEPT / f"{self.name}.npz"

    @property
    def label(self) -> str:
        """The row, and what its trial changes."""
        changed = {name.rpartition(".")[2]: x for name, x in trials(self.row)[self.trial].items()}
        return " ".join((self.row, *(f"{name}={x:g}" for name, x in changed.items())))

    def overrides(self) -> dict[str, Any]:
        """The fields that differ from the default config."""
        setting, row = SETTINGS[self.setting], ROWS[self.row]
        epochs = setting.epochs / row.members
        shared = {
            "optimizer.schedule": "linear",
            "model.width": 16,
            "train.epochs": float(epochs),
            "data.calibration_size": setting.held_out,
            "log.calibration_every_epochs": float(epochs),
            "checkpoint.every_epochs": epochs / 5,
            "checkpoint.keep": 1,
            "process.watchdog_seconds": 0.0,
        }
        own = {"method": row.method, "seed": self.seed}
        chosen = {**shared, **setting.config, **row.config, **trials(self.row)[self.trial], **own}
        if share := chosen.pop("warmup_share", None):
            chosen["loss.warmup_epochs"] = share * epochs
        return chosen


def trials(row: str) -> list[dict[str, Any]]:
    """What a row is tuned over; its own config first."""
    return [{}, *({name: x} for name, values in TRIALS.get(row, _RATES).items() for x in values)]


def tuned(row: str) -> int:
    """The trial with the least AURC on calibration, by the method's own score."""
    found = [Cell("few-54", row, TUNING_SEED, trial) for trial in range(len(trials(row)))]
    areas = [calibration_area(cell, own=True) for cell in found if cell.kept.exists()]
    return int(np.argmin(areas)) if len(areas) == len(found) else 0


def calibration_area(cell: Cell, *, own: bool = False) -> float:
    """AURC on calibration: by the method's own score, or the less of it and the SR's."""
    about = Kept.read(cell.kept).about
    areas: dict[str, float] = about["calibration"]
    return areas[about["score"]] if own else min(areas[about["score"]], areas["softmax_response"])


def ratios(setting: str) -> dict[str, float]:
    """The calibration AURC of each member of the family, over that of ce; {} until all are run."""
    members = [Cell(setting, row, 0) for row in FAMILY]
    reference = Cell(setting, "ce", 0)
    if setting == "full-12":
        members = [cell for cell in members if cell.row in finalists()]
    if not members or not all(cell.kept.exists() for cell in (reference, *members)):
        return {}
    return {x.row: calibration_area(x) / calibration_area(reference) for x in members}


def finalists() -> list[str]:
    """The members that are run in full-12: those near the best in few-54; no controls."""
    found = {x: ratio for x, ratio in ratios("few-54").items() if x not in CONTROLS}
    near = min(found.values(), default=0.0) + 0.04
    return [x for x in sorted(found, key=found.__getitem__) if found[x] <= near]


def member() -> str:
    """The member with the least sum of ratios in few-54 and full-12; '' until it is known."""
    few, full = ratios("few-54"), ratios("full-12")
    return min(full, key=lambda row: few[row] + full[row]) if full else ""


def cells(stage: str) -> list[Cell]:
    """The cells of a stage; some are known once an earlier stage is done."""
    main = ["ce", "selectivenet", "sync", "control"]
    main += [x for x in (member(),) if x and x not in main]
    if stage == "family":
        first = [Cell("few-54", row, 0) for row in ("ce", *FAMILY)]
        return first + [Cell("full-12", row, 0) for row in ("ce", *finalists())]
    if stage == "tuning":
        rows = [*main, *(row for row in TRIALS if row not in main)]
        numbered = [(row, trial) for row in rows for trial in range(len(trials(row)))]
        return [Cell("few-54", row, TUNING_SEED, trial) for row, trial in numbered]
    if stage == "rivals":
        return [Cell(x, row, 0, tuned(row)) for x in ("few-54", "full-12") for row in RIVALS]
    if stage == "large":
        rows = [x for x in main if x not in ("selectivenet", "sync")]
        return [Cell(x, row, 0, tuned(row)) for x in ("few-54-resnet", "full-40") for row in rows]
    if stage == "confirm":
        return [Cell("cars", row, seed, tuned(row)) for seed in range(3) for row in main]
    settings = [x for x in SETTINGS if x not in ("cars", "full-40", "few-54-resnet")]
    return [
        Cell(setting, row, seed, tuned(row))
        for seed in range(3)
        for setting in settings
        if seed < SETTINGS[setting].seeds
        for row in main
    ]


STAGES = ("family", "tuning", "main", "rivals", "large", "confirm")


class Data:
    """The arrays of every setting, read once."""

    def __init__(self, folders: Mapping[str, Path | None], confusion: Path | None):
        """Takes the folders of pictures by data set, and a file of human confusion counts."""
        self._folders, self._confusion = folders, confusion
        self._read: dict[str, tuple[Arrays, Arrays]] = {}
        self._made: tuple[str, MemoryDataset] | None = None

    def of(self, name: str) -> MemoryDataset:
        """The data set of a setting: a subset with noisy labels, where it asks for that."""
        if self._made is None or self._made[0] != name:
            self._made = name, self._make(SETTINGS[name])
        return self._made[1]

    def _make(self, setting: Setting) -> MemoryDataset:
        if setting.data not in self._read:
            self._read[setting.data] = self._arrays(setting.data)
        (images, labels), test = self._read[setting.data]
        classes = int(labels.max()) + 1
        rng = np.random.default_rng(0)
        if setting.per_class:
            count = setting.per_class + setting.held_out // classes
            order = rng.permutation(len(labels))
            rows = np.sort(
                np.concatenate([order[labels[order] == c][:count] for c in range(classes)])
            )
            images, labels = images[rows], labels[rows]
        labels = self._noisy(labels, classes, setting.noise, rng)
        return MemoryDataset(images, labels, tuple(map(str, range(classes))), test)

    def _noisy(
        self, labels: np.ndarray, classes: int, noise: str, rng: np.random.Generator
    ) -> np.ndarray:
        if noise == "symmetric":
            wrong = rng.random(len(labels)) < 0.2
            other = (labels + rng.integers(1, classes, len(labels))) % classes
            return np.where(wrong, other, labels)
        if noise == "human":
            if self._confusion is None:
                raise SystemExit("--confusion names the matrix of counts, see docs/evidence.md")
            counts = np.load(self._confusion, allow_pickle=False)
            chances = np.cumsum(counts / counts.sum(axis=1, keepdims=True), axis=1)
            return (rng.random((len(labels), 1)) > chances[labels]).sum(axis=1)
        return labels

    def _arrays(self, name: str) -> tuple[Arrays, Arrays]:
        if name == "fashion_mnist":
            dataset = registry.dataset(default_config().data)
            dataset.prepare()
            return dataset.load("train"), dataset.load("test")  # type: ignore[return-value]
        folder = self._folders[name]
        if folder is None:
            raise SystemExit(f"--{name} names the folder of its pictures")
        size = 32 if name == "cifar100" else 64
        return read_pictures(folder / "train", size), read_pictures(folder / "test", size)


def read_pictures(folder: Path, size: int) -> Arrays:
    """Images `[n, size, size, 3]` and labels of class folders, ordered by a hash of the pixels."""
    images, labels, keys = [], [], []
    for label, each in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for path in each.iterdir():
            image = square(decode(path), size, size)
            images.append(image)
            labels.append(label)
            keys.append(hashlib.sha256(image.tobytes()).digest())
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.stack([images[i] for i in order]), np.asarray(labels)[order]


def run(cell: Cell, data: Data, out: Path) -> None:
    """Trains a cell, or goes on with it, and keeps its errors and ranks."""
    dataset, workdir, began = data.of(cell.setting), out / cell.name, time.monotonic()
    splits: list[list[Predictions]] = []
    for number in range(ROWS[cell.row].members):
        config: ConfigDict = default_config()
        config.data.name = "memory"
        with config.ignore_type():
            config.update_from_flattened_dict(cell.overrides())
        config.seed += 1000 * number
        resolve(config)
        folder = workdir / str(number)
        with train.prepared(config, dataset, folder, Processes()) as job:
            state = train.fit(job, train.begin(job)).state
            parts = job.calibration_part, load_test(dataset)
            splits.append([job.trainer.predict(state, part) for part in parts])
            own = job.trainer.method.score
    calibration, test = map(combine, zip(*splits, strict=True)) if splits[1:] else splits[0]
    about = {
        "config": cell.overrides(),
        "calibration": scored(calibration, calibration),
        "test": scored(test, calibration),
        "calibration_accuracy": float(1 - calibration.wrong.mean()),
        "training_accuracy": [x["accuracy"] for x in read_metrics(folder) if "loss" in x][-1],
        "score": own,
        "seconds": time.monotonic() - began,
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
    }
    keep(cell.kept, test, about)
    shutil.rmtree(workdir)


def scored(predictions: Predictions, calibration: Predictions) -> dict[str, float]:
    """AURC by every score, and by SR at the temperature with the least NLL on calibration."""
    areas = {
        name: predictions.confidence(name, **fit_parameters(calibration, score=score))
        for name, score in SCORES.items()
        if score.applies(predictions.outputs)
    }
    logits = {"logits": predictions.outputs["logits"].astype(np.float64)}
    temperature = fitted_temperature(calibration)
    areas["temperature"] = softmax_response({"logits": logits["logits"] / temperature})
    return {name: metrics.aurc(area, loss=predictions.wrong) for name, area in areas.items()}


def fitted_temperature(calibration: Predictions) -> float:
    """The temperature with the least negative log-likelihood (Guo et al., 2017)."""
    logits = calibration.outputs["logits"].astype(np.float64)

    def likelihood(log_temperature: float) -> float:
        probabilities = softmax(logits / np.exp(log_temperature))
        return metrics.negative_log_likelihood(probabilities, calibration.labels)

    found = minimize_scalar(likelihood, bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def keep(path: Path, test: Predictions, about: dict[str, Any]) -> None:
    """Writes the errors of the test examples, and their ranks by each score: equal ones tie."""
    names = dict.fromkeys(("softmax_response", about["score"]))
    ranks = {
        f"rank/{name}": np.unique(test.confidence(name), return_inverse=True)[1].astype(np.uint16)
        for name in names
    }
    arrays: dict[str, Any] = {
        "wrong": np.packbits(test.wrong.astype(bool)),
        "count": np.asarray(len(test.labels)),
        "about": np.asarray(json.dumps(about)),
        **ranks,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


@dataclasses.dataclass(frozen=True)
class Kept:
    """The errors and ranks that are kept of a run."""

    wrong: np.ndarray  # [n]
    ranks: Mapping[str, np.ndarray]  # [n] by score: higher is more confident
    about: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Kept":
        """Reads what `keep` wrote."""
        with np.load(path, allow_pickle=False) as file:
            wrong = np.unpackbits(file["wrong"])[: int(file["count"])].astype(np.float64)
            ranks = {name[5:]: file[name] for name in file.files if name.startswith("rank/")}
            return cls(wrong, ranks, json.loads(str(file["about"])))


def tables(stages: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a table for each stage and setting that has kept runs."""
    for stage in stages:
        runs: dict[str, dict[str, dict[int, Kept]]] = {}
        for cell in cells(stage) if stage != "tuning" else ():
            if cell.kept.exists():
                rows = runs.setdefault(cell.setting, {})
                rows.setdefault(cell.label, {})[cell.seed] = Kept.read(cell.kept)
        for setting, rows in runs.items():
            yield from _table(f"{stage}: {setting}", rows)


def _table(title: str, runs: Mapping[str, Mapping[int, Kept]]) -> Iterator[str]:
    yield f"\n### {title}\n"
    errors = " | ".join(f"{coverage} %" for coverage in COVERAGES)
    own = "row, score | seeds | AURC x1000 | minus ce [95 %] | p (Holm)"
    yield f"| {own} | {errors} | accuracy % |"
    yield "|" + "---|" * (len(COVERAGES) + 6)
    lines = {
        (row, score): seeds
        for row, seeds in runs.items()
        for score in dict.fromkeys(
            ("softmax_response", *(k.about["score"] for k in seeds.values()))
        )
    }
    areas = {line: _areas(seeds, line[1]) for line, seeds in lines.items()}
    reference = next((line for line in lines if line[0].split()[0] == "ce"), None)
    against = {
        line: difference(areas[line], areas[reference])
        for line in lines
        if reference is not None and line != reference
    }
    corrected = holm({line: p for line, (*_, p) in against.items()})
    for line in sorted(
        lines, key=lambda line: float(np.mean([a[0] for a in areas[line].values()]))
    ):
        row, score = line
        seeds = lines[line].values()
        area = _mean([1000 * a[0] for a in areas[line].values()])
        gap = p = "-"
        if line in against:
            gap = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(1000 * x for x in against[line][:3]))
            p = f"{corrected[line]:.3f}"
        risks = [
            _mean([100 * selective_risk(k.ranks[score], k.wrong, c / 100) for k in seeds])
            for c in COVERAGES
        ]
        accuracy = _mean([100 * (1 - k.wrong.mean()) for k in seeds])
        label = f"{row}, {SCORES[score].label}"
        yield f"| {' | '.join((label, str(len(seeds)), area, gap, p, *risks, accuracy))} |"


def selective_risk(ranks: np.ndarray, wrong: np.ndarray, coverage: float) -> float:
    """Selective error at a coverage, rank-based."""
    return float(metrics.selective_risk(ranks, loss=wrong, coverage=coverage))


def _areas(seeds: Mapping[int, Kept], score: str) -> dict[int, np.ndarray]:
    """AURC by seed: the value, then those of the resamples, which all rows of a setting share."""
    return {
        seed: np.concatenate(
            [
                [metrics.aurc(kept.ranks[score], loss=kept.wrong)],
                metrics.bootstrap_values(
                    metrics.aurc, kept.ranks[score], loss=kept.wrong, resamples=RESAMPLES, seed=seed
                ),
            ]
        )
        for seed, kept in seeds.items()
    }


def difference(
    a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]
) -> tuple[float, float, float, float]:
    """Mean of a - b over the seeds that both have, its 95 % interval, and a two-sided p-value.

    Each resample draws seeds, and the same test examples for both rows.
    """
    gaps = np.stack([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
    count, resamples = len(gaps), gaps.shape[1] - 1
    drawn = np.random.default_rng(0).integers(count, size=(resamples, count))
    values = gaps[:, 1:][drawn, np.arange(resamples)[:, None]].mean(axis=1)
    low, high = np.quantile(values, [0.025, 0.975])
    tail = min((values <= 0).sum(), (values >= 0).sum())
    return (
        float(gaps[:, 0].mean()),
        float(low),
        float(high),
        min(2 * (tail + 1) / (resamples + 1), 1),
    )


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's corrected p-values."""
    corrected, largest = {}, 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(value * (len(p) - rank), 1.0))
        corrected[name] = largest
    return corrected


def _mean(values: Sequence[float]) -> str:
    """'mean ± standard deviation'."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def main() -> None:
    """Lists, runs or tabulates."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="cells and cost of each stage")
    parser.add_argument("--table", action="store_true", help="the tables, in Markdown")
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all")
    parser.add_argument("--cifar100", type=Path, help="folder of train/ and test/<class>/*.png")
    parser.add_argument("--cars", type=Path, help="likewise")
    parser.add_argument(
        "--confusion", type=Path, help=".npy [100, 100], human labels by true class"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evidence"), help="of unfinished runs"
    )
    arguments = parser.parse_args()
    stages = arguments.stage or STAGES
    if arguments.table:
        print("\n".join(tables(stages)))
        return
    todo: dict[Cell, None] = {}
    for stage in stages:
        wanted = cells(stage)
        left = [cell for cell in wanted if not cell.kept.exists() and cell not in todo]
        todo |= dict.fromkeys(left)
        hours = sum(SETTINGS[cell.setting].seconds for cell in left) / 7200
        print(f"{stage}: {len(wanted)} cells, {len(left)} to run, about {hours:.1f} h on two cores")
    if arguments.list:
        return
    keep_freed_memory()
    compilation_cache.use(default_config().process.compilation_cache)
    folders = {"cifar100": arguments.cifar100, "cars": arguments.cars}
    data = Data(folders, arguments.confusion)
    for stage in stages:
        work(stage, data, arguments.out)


def work(stage: str, data: Data, out: Path) -> None:
    """Runs the cells of a stage that no other process is at; waits for those until all are kept."""
    while left := [cell for cell in cells(stage) if not cell.kept.exists()]:
        for cell in left:
            with contextlib.suppress(BlockingIOError), claimed(out / f"{cell.name}.lock"):
                if not cell.kept.exists():
                    print(f"=== {stage}: {cell.name}, {len(left)} left", flush=True)
                    run(cell, data, out)
                break
        else:
            time.sleep(10)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Holds a lock, which ends with the process; BlockingIOError where another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


if __name__ == "__main__":
    main()
