"""Why does the selection function g order examples worse than the softmax response (SR)?

    python -m benchmarks.selection_head --cifar100=FOLDER --setting=few-54

Trains SelectiveNet, `sync` and a member with the prior in g's logit as `benchmarks.evidence` does,
and looks at each several times an epoch is over: how g ranks beside SR on training and calibration
images, and how large the gradient of each term is on the features. At the end it trains new
selection heads on what the network shows: on its features, its logits or both, for the correctness
of training or of held-out images. Nothing here is read from a test split. Writes a table and
pictures into benchmarks/results/evidence.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy.stats import spearmanr
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from benchmarks.evidence import KEPT, TUNING_SEED, Cell, Data
from benchmarks.step import describe_machine
from sync_jax import metrics, train
from sync_jax.config import default_config
from sync_jax.data.augmentation import normalise
from sync_jax.data.splits import Part
from sync_jax.evaluation.predictions import Predictions
from sync_jax.runtime import compilation_cache
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.runtime.processes import Processes
from sync_jax.scores import log_odds
from sync_jax.steps import TrainState
from sync_jax.trainer import Trainer, resolve

ROWS = ("selectivenet", "sync", "rank-0.05")
LOOKS = 12  # at each network
TERMS = ("selective_risk", "coverage_penalty", "auxiliary_loss", "synchronisation")
SHOWN = 2000  # training images that are looked at


class Identity(nn.Module):
    """A backbone whose features are what it is given."""

    @nn.compact
    def __call__(self, features: Array, *, train: bool) -> Array:
        """Returns the features."""
        del train
        return features


def looks(row: str, setting: str, data: Data, out: Path) -> tuple[list[dict[str, Any]], Any]:
    """Trains a row; returns what each look saw, and the trained network's job and state."""
    config: ConfigDict = default_config()
    config.data.name = "memory"
    cell = Cell(setting, row, TUNING_SEED)
    with config.ignore_type():
        config.update_from_flattened_dict(cell.overrides())
    resolve(config)
    seen = []
    with train.prepared(config, data.of(setting), out / f"{row}", Processes()) as job:
        trainer = job.trainer
        state, _ = trainer.create_state()
        feed, total = trainer.feed(job.train_part, 0), trainer.total_steps
        shown = _first(job.train_part, SHOWN)
        at = {round(total * share) for share in np.linspace(0, 1, LOOKS + 1)[1:]}
        for done in range(1, total + 1):
            state, _ = trainer.step(state, next(feed))
            if done not in at:
                continue
            entry: dict[str, Any] = {"epoch": done / trainer.steps_per_epoch}
            for name, part in (("train", shown), ("calibration", job.calibration_part)):
                entry[name] = ranks(trainer.predict(state, part))
            entry["gradients"] = gradients(trainer, state, _first(shown, 512))
            seen.append(entry)
            print(row, json.dumps(entry), flush=True)
        heads = probes(trainer, state, shown, job.calibration_part)
    return seen, heads


def _first(part: Part, count: int) -> Part:
    return Part(part.images[:count], part.labels[:count], part.index[:count])


def ranks(predictions: Predictions) -> dict[str, float]:
    """How g orders a split beside SR."""
    g, sr = predictions.confidence("selection"), predictions.confidence("softmax_response")
    # By logits, which tell apart what rounds to 1.
    logit = predictions.outputs["selection_logits"]
    odds = log_odds({"logits": predictions.outputs["logits"].astype(np.float64)})
    right = 1 - predictions.wrong
    both = 0 < right.sum() < len(right)
    return {
        "spearman": float(spearmanr(logit, odds).statistic),
        "mean_g": float(g.mean()),
        "mean_sr": float(sr.mean()),
        "accuracy": float(right.mean()),
        "auroc_g": metrics.failure_auroc(logit, correct=right) if both else 1.0,
        "auroc_sr": metrics.failure_auroc(odds, correct=right) if both else 1.0,
        "aurc_g": metrics.aurc(logit, loss=1 - right),
        "aurc_sr": metrics.aurc(odds, loss=1 - right),
    }


def features_of(trainer: Trainer, state: TrainState, part: Part) -> Array:
    """The features of images, by running statistics."""
    network = trainer.settings.network
    bound = network.bind({"params": state.params, "batch_stats": state.batch_stats})
    info = trainer.info
    pieces = [
        bound.backbone(
            normalise(jnp.asarray(part.images[i : i + 500]), info.mean, info.std, info.scale),
            train=False,
        )
        for i in range(0, len(part.labels), 500)
    ]
    return jnp.concatenate(pieces).astype(jnp.float32)


def gradients(trainer: Trainer, state: TrainState, part: Part) -> dict[str, float]:
    """The norm of each weighted term's gradient on the features, and its cosine with the risk's."""
    config, labels = trainer.config, jnp.asarray(part.labels)
    heads = trainer.settings.network.clone(backbone=Identity())
    variables = {
        "params": {k: v for k, v in state.params.items() if k != "backbone"},
        "batch_stats": {k: v for k, v in state.batch_stats.items() if k != "backbone"},
    }
    features = features_of(trainer, state, part)
    loss = config.loss
    weights = {
        "selective_risk": loss.alpha,
        "coverage_penalty": loss.alpha * loss.coverage_weight,
        "auxiliary_loss": 1.0 - loss.alpha,
        "synchronisation": loss.get("sync_weight", 0.0),
    }

    def term(name: str) -> Callable[[Array], Array]:
        def value(features: Array) -> Array:
            outputs = heads.apply(variables, features, train=False)
            _, terms = trainer.method.objective(outputs, labels, jnp.ones(len(labels)), config)
            return weights[name] * terms.get(name, jnp.zeros(()))

        return value

    found = {name: np.asarray(jax.grad(term(name))(features)) for name in weights}
    norms = {name: float(np.linalg.norm(g)) for name, g in found.items()}
    risk = found["selective_risk"]
    cosines = {
        f"{name}_cosine": float((g * risk).sum() / (norms[name] * norms["selective_risk"]))
        for name, g in found.items()
        if name != "selective_risk" and norms[name] > 0 and norms["selective_risk"] > 0
    }
    return norms | cosines


def probes(
    trainer: Trainer, state: TrainState, shown: Part, calibration: Part
) -> list[dict[str, Any]]:
    """New heads, of 512 units as g's, on frozen outputs; judged on half of the calibration split.

    Each learns which predictions are right: on training images or on the other half.
    """
    half = len(calibration.labels) // 2
    parts = {"training": shown, "held-out": _first(calibration, half)}
    judged = Part(calibration.images[half:], calibration.labels[half:], calibration.index[half:])

    def seen(part: Part) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        predictions = trainer.predict(state, part)
        features = np.asarray(features_of(trainer, state, part))
        logits = -np.sort(-predictions.outputs["logits"], axis=-1)[:, :10]
        inputs = {
            "features": features,
            "logits": logits - logits[:, :1],
            "both": np.concatenate([features, logits - logits[:, :1]], axis=1),
        }
        odds = log_odds({"logits": predictions.outputs["logits"].astype(np.float64)})
        return inputs, 1 - predictions.wrong, odds

    target, right, odds = seen(judged)
    rows = [{"taught by": "-", "sees": "SR itself", "aurc": metrics.aurc(odds, loss=1 - right)}]
    for name, part in parts.items():
        inputs, correct, _ = seen(part)
        for sees, values in inputs.items():
            scaler = StandardScaler().fit(values)
            head = MLPClassifier((512,), early_stopping=True, random_state=0, max_iter=100)
            head.fit(scaler.transform(values), correct)
            p = head.predict_proba(scaler.transform(target[sees]))
            score = p[:, 1] if p.shape[1] > 1 else np.zeros(len(right))
            rows.append(
                {
                    "taught by": name,
                    "sees": sees,
                    "aurc": metrics.aurc(score, loss=1 - right),
                    "spearman with SR": float(spearmanr(score, odds).statistic),
                    "accuracy there": float(correct.mean()),
                }
            )
    return rows


def draw(seen: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Rank correlation, AURC on calibration, and gradients, by epoch, a column per row."""
    figure = Figure(figsize=(4 * len(seen), 9), layout="constrained")
    axes = figure.subplots(3, len(seen), squeeze=False)
    for column, (row, entries) in enumerate(seen.items()):
        epochs = [entry["epoch"] for entry in entries]
        top, middle, bottom = axes[:, column]
        for split, style in (("train", "--"), ("calibration", "-")):
            values = [entry[split]["spearman"] for entry in entries]
            top.plot(epochs, values, style, color="C0", label=f"{split} images")
        top.set(title=row, ylim=(-0.2, 1.02), ylabel="Spearman's rank correlation, g and SR")
        for score, colour in (("g", "C1"), ("sr", "C2")):
            values = [1000 * entry["calibration"][f"aurc_{score}"] for entry in entries]
            middle.plot(
                epochs,
                values,
                color=colour,
                label=f"by {score.upper() if score == 'sr' else score}",
            )
        middle.set(ylabel="AURC x1000 on calibration")
        for index, name in enumerate(
            ("selective_risk", "coverage_penalty", "auxiliary_loss", "synchronisation")
        ):
            values = [max(entry["gradients"][name], 1e-6) for entry in entries]
            bottom.semilogy(epochs, values, color=f"C{index}", label=name.replace("_", " "))
        bottom.set(xlabel="epoch", ylabel="gradient on the features (norm)", ylim=(1e-5, None))
        for axis in (top, middle, bottom):
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def table(probed: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The heads that were trained afterwards, in Markdown."""
    yield "| network | new head sees | taught by | AURC x1000 | Spearman with SR |"
    yield "|---|---|---|---|---|"
    for row, heads in probed.items():
        for head in heads:
            correlation = head.get("spearman with SR")
            shown = "" if correlation is None else f"{correlation:.3f}"
            area = f"{1000 * head['aurc']:.1f}"
            yield f"| {row} | {head['sees']} | {head['taught by']} | {area} | {shown} |"


def main() -> None:
    """Trains, looks, and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar100", type=Path, required=True, help="as of benchmarks.evidence")
    parser.add_argument("--setting", default="few-54")
    parser.add_argument("--out", type=Path, default=Path("runs/selection_head"))
    arguments = parser.parse_args()
    keep_freed_memory()
    compilation_cache.use(default_config().process.compilation_cache)
    data = Data({"cifar100": arguments.cifar100, "cars": None}, None)
    results = {row: looks(row, arguments.setting, data, arguments.out) for row in ROWS}
    seen, probed = ({row: result[i] for row, result in results.items()} for i in (0, 1))
    KEPT.mkdir(parents=True, exist_ok=True)
    name = f"selection_head-{arguments.setting}"
    record = {"machine": describe_machine(), "looks": seen, "heads": probed}
    (KEPT / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(seen, KEPT / f"{name}.png")
    print("\n".join(table(probed)))


if __name__ == "__main__":
    main()
