"""The evidence on SYNC: every run of docs/evidence.md, kept compactly, and its tables.

    python -m benchmarks.evidence --list                             # cells and cost; runs nothing
    python -m benchmarks.evidence --cifar100=FOLDER --stage=family   # goes on where it was stopped
    python -m benchmarks.evidence --table                            # from what is kept

A cell is a setting, a row (a method with its options) and a seed. Of each the test errors and the
ranks of the test examples by each score are kept in benchmarks/results/evidence, from which every
number of the tables is computed.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.step import describe_machine
from sync_jax import metrics, train
from sync_jax.config import default_config
from sync_jax.data import registry
from sync_jax.data.datasets.memory import MemoryDataset
from sync_jax.data.images import decode, square
from sync_jax.data.splits import load_test
from sync_jax.evaluation.predictions import Predictions
from sync_jax.runtime import compilation_cache
from sync_jax.runtime.files import write_atomically
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.training_log import read_metrics
from sync_jax.scores import SCORES
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
    seconds: float  # of a run, on two cores
    held_out: int = 5000
    per_class: int = 0  # training images; 0: all
    noise: str = ""  # "symmetric": 20 % of the labels are others; "human": a confusion matrix's
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FASHION = {"data.crop_padding": 1, "data.flip": True, "optimizer.learning_rate": 0.2}
_CIFAR = {"data.crop_padding": 4, "data.flip": True, "optimizer.learning_rate": 0.1}
_RESNET = _CIFAR | {"model.name": "resnet18", "model.width": 8}
SETTINGS = {
    "fashion": Setting("fashion_mnist", 7, 60, held_out=6000, config=_FASHION),
    "full-12": Setting("cifar100", 12, 230, config=_CIFAR),
    "full-40": Setting("cifar100", 40, 740, config=_CIFAR),
    "few-20": Setting("cifar100", 100, 95, per_class=20, config=_CIFAR),
    "few-54": Setting("cifar100", 60, 140, per_class=54, config=_CIFAR),
    "few-150": Setting("cifar100", 35, 220, per_class=150, config=_CIFAR),
    "few-54-resnet": Setting("cifar100", 40, 400, per_class=54, config=_RESNET),
    "fashion-noise": Setting(
        "fashion_mnist", 7, 60, held_out=6000, noise="symmetric", config=_FASHION
    ),
    "full-12-noise": Setting("cifar100", 12, 230, noise="symmetric", config=_CIFAR),
    "few-54-noise": Setting("cifar100", 60, 140, per_class=54, noise="symmetric", config=_CIFAR),
    "few-54-human": Setting("cifar100", 60, 140, per_class=54, noise="human", config=_CIFAR),
    "cars": Setting("cars", 40, 400, held_out=567, config=_CIFAR),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method with its options."""

    method: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_CORRECTNESS = {"loss.sync_target": "correctness", "loss.coverage_weight": 0.0}
_POSTERIOR = _CORRECTNESS | {"loss.logit_prior": "fixed", "loss.detach_features": True}
_RANK = _POSTERIOR | {"loss.risk_weight": "rank"}
FAMILY = {
    "sync": Row("sync"),
    "control": Row("sync", _POSTERIOR | {"loss.risk_weight": "equal"}),
    "posterior": Row("sync", {"loss.logit_prior": "fixed", "loss.sync_target": "correctness"}),
    "posterior-learnt": Row("sync", _POSTERIOR | {"loss.logit_prior": "learnt"}),
    "weight-by-value": Row("sync", {"loss.prior_weight": 1.0, "loss.prior_power": 1.0}),
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
}
RIVALS = {
    "ce": Row("ce"),
    "selectivenet": Row("selectivenet"),
    "deep_gamblers": Row("deep_gamblers"),
    "self_adaptive": Row("self_adaptive"),
    "self_adaptive+em": Row("self_adaptive", {"loss.entropy_weight": 0.01}),
    "ccl_sc": Row("ccl_sc"),
    "mc_dropout": Row("mc_dropout", {"loss.dropout": 0.2}),
}
ROWS = RIVALS | FAMILY
# The same number of trials for every method: its defaults, and three values of what it tunes.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "ce": [{}, *({"optimizer.learning_rate": x} for x in (0.05, 0.2, 0.4))],
    "selectivenet": [{}, *({"target_coverage": c} for c in (0.5, 0.7, 0.9))],
    "sync": [{}, *({"loss.sync_weight": x} for x in (0.1, 1.0, 2.0))],
    "rank-0.05": [{}, *({"optimizer.learning_rate": x} for x in (0.05, 0.2, 0.4))],
    "deep_gamblers": [{}, *({"loss.payoff": x} for x in (4.0, 6.0, 10.0))],
    "self_adaptive": [{}, *({"loss.target_momentum": x} for x in (0.8, 0.95, 0.99))],
    "ccl_sc": [{}, *({"loss.contrast_weight": x} for x in (0.1, 0.3, 3.0))],
    "mc_dropout": [{}, *({"loss.dropout": x} for x in (0.1, 0.3, 0.5))],
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

    def overrides(self) -> dict[str, Any]:
        """The fields that differ from the default config."""
        setting, row = SETTINGS[self.setting], ROWS[self.row]
        trial = TRIALS[self.row][self.trial] if self.trial else {}
        shared = {
            "optimizer.schedule": "linear",
            "model.width": 16,
            "train.epochs": float(setting.epochs),
            "data.calibration_size": setting.held_out,
            "log.calibration_every_epochs": float(setting.epochs),
            "checkpoint.every_epochs": setting.epochs / 5,
            "checkpoint.keep": 1,
            "process.watchdog_seconds": 0.0,
        }
        own = {"method": row.method, "seed": self.seed}
        return {**shared, **setting.config, **row.config, **trial, **own}


def cells(stage: str) -> list[Cell]:
    """The cells of a stage, the cheapest settings first."""
    two = ("few-54", "full-12")
    if stage == "tuning":
        trials = [(row, trial) for row in TRIALS for trial in range(len(TRIALS[row]))]
        return [Cell("few-54", row, TUNING_SEED, trial) for row, trial in trials]
    if stage == "family":
        return [Cell(setting, row, 0) for setting in two for row in ("ce", *FAMILY)]
    if stage == "rivals":
        return [Cell(setting, row, 0) for setting in two for row in RIVALS]
    main = ("ce", "selectivenet", "sync", "control", "rank-0.05")
    if stage == "large":
        large, few = ("few-54-resnet", "full-40"), ("ce", "control", "rank-0.05")
        return [Cell(setting, row, 0) for setting in large for row in few]
    if stage == "confirm":
        return [Cell("cars", row, seed) for seed in range(3) for row in main]
    settings = [name for name in SETTINGS if name not in ("cars", "full-40", "few-54-resnet")]
    return [Cell(setting, row, seed) for seed in range(3) for setting in settings for row in main]


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
    config: ConfigDict = default_config()
    config.data.name = "memory"
    with config.ignore_type():
        config.update_from_flattened_dict(cell.overrides())
    resolve(config)
    dataset, workdir = data.of(cell.setting), out / cell.name
    began = time.monotonic()
    processes = Processes()
    with train.prepared(config, dataset, workdir, processes) as job:
        state = train.fit(job, train.begin(job)).state
        seconds = time.monotonic() - began
        calibration = job.trainer.predict(state, job.calibration_part)
        test = job.trainer.predict(state, load_test(dataset))
    own = job.trainer.method.score
    about = {
        "config": cell.overrides(),
        "calibration": {name: scored(calibration, name) for name in {"softmax_response", own}},
        "calibration_accuracy": float(1 - calibration.wrong.mean()),
        "training_accuracy": read_metrics(workdir)[-1].get("accuracy"),
        "score": own,
        "seconds": seconds,
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
    }
    keep(cell.kept, test, about)
    shutil.rmtree(workdir)


def scored(predictions: Predictions, score: str) -> float:
    """AURC by a score."""
    return metrics.aurc(predictions.confidence(score), loss=predictions.wrong)


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
    """Yields the lines of a table for each setting that has kept runs."""
    wanted = dict.fromkeys(cell for stage in stages for cell in cells(stage) if not cell.trial)
    for setting in SETTINGS:
        runs: dict[str, dict[int, Kept]] = {}
        for cell in wanted:
            if cell.setting == setting and cell.seed != TUNING_SEED and cell.kept.exists():
                runs.setdefault(cell.row, {})[cell.seed] = Kept.read(cell.kept)
        if runs:
            yield from _table(setting, runs)


def _table(setting: str, runs: Mapping[str, Mapping[int, Kept]]) -> Iterator[str]:
    yield f"\n### {setting}\n"
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
    reference = ("ce", "softmax_response")
    against = {
        line: difference(areas[line], areas[reference])
        for line in lines
        if reference in lines and line != reference
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
    parser.add_argument("--shard", default="1/1", help="i/n: the i-th of n processes")
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
        hours = sum(SETTINGS[cell.setting].seconds for cell in left) / 3600
        print(f"{stage}: {len(wanted)} cells, {len(left)} to run, about {hours:.1f} h on two cores")
    if arguments.list:
        return
    keep_freed_memory()
    compilation_cache.use(default_config().process.compilation_cache)
    folders = {"cifar100": arguments.cifar100, "cars": arguments.cars}
    data = Data(folders, arguments.confusion)
    shard, shards = map(int, arguments.shard.split("/"))
    mine = [cell for i, cell in enumerate(todo) if i % shards == shard - 1]
    for number, cell in enumerate(mine, start=1):
        print(f"=== {number} of {len(mine)}: {cell.name}", flush=True)
        run(cell, data, arguments.out)


if __name__ == "__main__":
    main()
