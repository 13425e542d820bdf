"""Are planted label errors found? Precision and recall of `--mode=labels` on CIFAR-100.

    python -m benchmarks.label_errors --cifar100=FOLDER

A tenth of the training labels are replaced by another class at random. CIFAR-100's own errors count
as false alarms here, so precision is a lower bound.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.evidence import read_pictures
from benchmarks.step import describe_machine
from sync_jax import sweep
from sync_jax.config import default_config
from sync_jax.data.datasets.memory import MemoryDataset
from sync_jax.runtime import compilation_cache
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.trainer import resolve

CONFIG = {
    "data.name": "memory",
    "data.crop_padding": 4,
    "method": "ce",
    "model.width": 16,
    "optimizer.schedule": "linear",
    "log.calibration_every_epochs": 100.0,
    "checkpoint.every_epochs": 2.0,
    "checkpoint.keep": 1,
}


def main() -> None:
    """Plants errors, looks for them, and counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar100", type=Path, required=True, help="as of benchmarks.evidence")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/label_errors"))
    arguments = parser.parse_args()
    keep_freed_memory()
    compilation_cache.use(default_config().process.compilation_cache)
    images, labels = read_pictures(arguments.cifar100 / "train", 32)
    rng = np.random.default_rng(0)
    planted = rng.random(len(labels)) < 0.1
    noisy = np.where(planted, (labels + rng.integers(1, 100, len(labels))) % 100, labels)
    dataset = MemoryDataset(images, noisy, tuple(map(str, range(100))))
    config = default_config()
    config.update_from_flattened_dict(CONFIG | {"train.epochs": arguments.epochs})
    resolve(config)
    found = sweep.label_errors(config, arguments.out, folds=arguments.folds, dataset=dataset)
    hits = planted[found.index]
    print(describe_machine())
    print(f"planted {planted.sum():,} of {len(labels):,}; listed {len(hits):,}")
    print(f"precision {hits.mean():.3f}, recall {hits.sum() / planted.sum():.3f}")
    for count in (100, 1000, 5000):
        print(f"of the first {count:,}: {hits[:count].mean():.3f} were planted")
    right = found.suggested[hits] == labels[found.index[hits]]
    print(f"of the planted that are listed, {right.mean():.3f} are given their true label back")


if __name__ == "__main__":
    main()
