"""Exports a trained classifier to a folder that runs without this package's training part."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

import sync_jax
from sync_jax.data.preprocessing import Preprocessing
from sync_jax.deploy.artifact import CARD, DECISION, NETWORK, WEIGHTS, Artifact, load, write_card
from sync_jax.errors import InputError
from sync_jax.evaluation.decision import Decision
from sync_jax.steps import Averaged, TrainState, run_evaluation
from sync_jax.trainer import Trainer

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of outputs, relative to their largest


def export(
    trainer: Trainer,
    state: TrainState,
    preprocessing: Preprocessing,
    decision: Decision,
    folder: Path,
    **about: Any,
) -> None:
    """Writes a folder as `deploy.artifact` describes it; complete or not at all.

    `about` are further fields of its card. InputError where the folder holds anything else.
    """
    if folder.exists() and (
        not folder.is_dir() or (os.listdir(folder) and not (folder / CARD).exists())
    ):
        raise InputError(f"{folder} holds other files; name another folder for the export")
    shown = state.opt_state if isinstance(state.opt_state, Averaged) else state
    weights = {
        "/".join(path): np.asarray(jax.device_get(x))
        for path, x in flatten_dict(
            {"params": shown.params, "batch_stats": shown.batch_stats}
        ).items()
    }
    settings = trainer.settings

    def outputs(weights: dict[str, jax.Array], inputs: jax.Array) -> dict[str, jax.Array]:
        tree = unflatten_dict({tuple(name.split("/")): x for name, x in weights.items()})
        plain = state.replace(
            params=tree["params"], batch_stats=tree.get("batch_stats", {}), opt_state=(), memory={}
        )
        return run_evaluation(plain, inputs, settings=settings)

    (size,) = jax.export.symbolic_shape("batch")
    kind = np.uint8 if len(preprocessing.shape) == 3 else np.float32
    exported = jax.export.export(jax.jit(outputs), platforms=PLATFORMS)(
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()},
        jax.ShapeDtypeStruct((size, *preprocessing.shape), kind),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as work:
        made = Path(work) / "made"
        made.mkdir()
        (made / NETWORK).write_bytes(exported.serialize())
        save_file(weights, made / WEIGHTS)
        (made / WEIGHTS).chmod(0o644)  # the library makes it the user's alone
        decision.save(made / DECISION)
        classes = decision.classes
        write_card(
            made,
            {
                "preprocessing": preprocessing.to_json(),
                "input": {"dtype": np.dtype(kind).name, "shape": ["batch", *preprocessing.shape]},
                "outputs": sorted(jax.tree.unflatten(exported.out_tree, exported.out_avals)),
                "classes": None if classes is None else classes.tolist(),
                "score": decision.score,
                "threshold": decision.threshold if np.isfinite(decision.threshold) else None,
                "certificate": dict(decision.chosen_by),
                "calibration_digest": decision.calibration_digest,
                "platforms": PLATFORMS,
                "versions": {"sync_jax": sync_jax.__version__, "jax": jax.__version__},
                **about,
            },
        )
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)


def differences(
    trainer: Trainer, state: TrainState, preprocessing: Preprocessing, artifact: Artifact
) -> dict[str, float]:
    """Largest differences of the outputs of a run and an artefact, relative to the largest output.

    Of 64 made inputs, from even to rough, so that no user's data need be there.
    """
    rng, shape = np.random.default_rng(0), preprocessing.shape
    if len(shape) == 1:
        inputs = rng.normal(size=(64, *shape)).astype(np.float32)
    else:
        cells = np.repeat(
            np.repeat(rng.integers(0, 256, (64, 8, 8, shape[2])), 1 + shape[0] // 8, 1),
            1 + shape[1] // 8,
            2,
        )
        rough = rng.integers(0, 256, (64, *shape))
        mixed = np.linspace(0, 1, 64)[:, None, None, None]
        inputs = (mixed * rough + (1 - mixed) * cells[:, : shape[0], : shape[1]]).astype(np.uint8)
    ours = trainer.outputs(state, inputs)
    theirs = artifact(inputs)
    return {
        name: float(np.abs(x - theirs[name]).max() / max(np.abs(x).max(), 1e-30))
        for name, x in ours.items()
    }


def check(
    trainer: Trainer,
    state: TrainState,
    preprocessing: Preprocessing,
    decision: Decision,
    folder: Path,
) -> float:
    """Reads an artefact and compares it with the run; returns the largest relative difference.

    Raises:
        InputError: a file was altered, or it answers otherwise than the run.
    """
    artifact, other, theirs = load(folder)
    if other != preprocessing:
        raise InputError(f"{folder} prepares its inputs otherwise than the run")
    if theirs.calibration_digest != decision.calibration_digest:
        raise InputError(f"{folder} was calibrated on other examples than the run")
    found = differences(trainer, state, preprocessing, artifact)
    worst = max(found, key=found.__getitem__)
    if not found[worst] <= TOLERANCE:
        raise InputError(
            f"{folder} answers otherwise than the run: {worst} differs by {found[worst]:.2g} of "
            f"its largest value, more than {TOLERANCE:g}"
        )
    return found[worst]
