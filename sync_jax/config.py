"""The default config: every field with its default, its bounds and a line of help.

Files in `configs/` change what they must. A method's hyperparameters are declared in its entry of
`methods.METHODS` and stand in the section `loss`; a backbone declares its own options, which join
the section `model`. Nothing here reads a file but `read_config`.
"""

import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sync_jax.errors import InputError, suggestion
from sync_jax.methods import METHODS, Method
from sync_jax.options import EVALUATION, Option, find, flatten

# The coverages of published tables, in percent.

# Fields that may change between a run and its continuation or re-evaluation: they move no weight.
# Pictures may move to another folder: a run knows them by their digest.
OPERATIONAL = (
    *("data.data_dir", "data.source", "data.folder", "data.workers", "optimizer.sharded"),
    *("train.on_nonfinite", "train.nonfinite_budget"),
    *("log.", "checkpoint.", "evaluation.", "process.", "profile."),
)
PATHS = (
    *("data.data_dir", "data.source", "data.folder", "model.pretrained"),
    "process.compilation_cache",
)
_SEED = "[0, 2147483647]"
_COUNT, _SIZE = "[1, inf)", "[0, inf)"

FIELDS: dict[str, Option] = {
    "method": Option("sync", "", "a name in methods.METHODS, or package.module:NAME"),
    "seed": Option(0, _SEED, "of initialisation, order of examples and augmentation"),
    "target_coverage": EVALUATION["target_coverage"],
    "data.name": Option("fashion_mnist", "", "a name in data.registry, or tfds:NAME"),
    "data.data_dir": Option(os.path.join("~", ".cache", "sync_jax"), "", "prepared datasets"),
    "data.source": Option("", "", "folder with the published files; empty: look for them"),
    "data.folder": Option("", "", "image_folder: folder/class/picture, a table or an archive"),
    "data.duplicates": Option(
        "group", ("group", "keep", "refuse"), "image_folder: equal pictures go to one side only"
    ),
    "data.unknown_classes": Option(
        "refuse", ("refuse", "drop"), "image_folder: pictures of a class that train has not"
    ),
    "data.group": Option(
        "", "", "image_folder: what goes together: 'parent', a column or a regular expression"
    ),
    "data.file_column": Option("", "", "of image_folder's table; empty: file_name, path, ..."),
    "data.label_column": Option("", "", "of image_folder's table; empty: label, class, ..."),
    # Of encoded pictures, in pixels. Training crops squares that are stored; evaluation takes the
    # middle of them.
    "data.image_size": Option(64, "[8, 1024]", "side of the network's input"),
    "data.short_side": Option(0, "[0, 1024]", "pictures are resized to; 0: stored_size"),
    "data.stored_size": Option(0, "[0, 1024]", "square kept; 0: short_side or image_size"),
    # Training images in device memory, as squares on the disk, or decoded for each batch on the
    # host; auto: the first of these that has room.
    "data.placement": Option("auto", ("auto", "device", "disk", "host")),
    "data.workers": Option(0, "[0, 256]", "host: processes that decode; 0: threads of this one"),
    "data.calibration_size": Option(6000, _SIZE, "held out of train; 0: a tenth, or your folder"),
    "data.split_seed": Option(0, _SEED, "of that hold-out, so that runs of all seeds share it"),
    "data.fold": Option("", "", "2/5: hold out the second of five parts of train instead"),
    "data.crop_padding": Option(2, "[0, 64]", "pixels of padding before a random crop; 0: none"),
    "data.flip": Option(True, "", "mirror left to right at random"),
    "data.rotation": Option(0.0, "[0, 180]", "degrees, at random either way"),
    "data.min_crop_area": Option(1.0, "(0, 1]", "least share of a random resized crop; 1: none"),
    "data.jitter": Option(0.0, "[0, 1]", "brightness, contrast, saturation times 1 - x to 1 + x"),
    "data.sharpen": Option(0.0, "[0, 1]", "probability of doubled sharpness"),
    "data.grey": Option(0.0, "[0, 1]", "probability of losing the colours"),
    "data.perspective": Option(0.0, "[0, 1]", "probability of a change of perspective"),
    "data.posterise": Option(0.0, "[0, 1]", "probability of keeping 2 bits a channel"),
    "model.name": Option("cnn", "", "a name in models.BACKBONES, auto, or package.module:NAME"),
    "model.dtype": Option("float32", ("float32", "bfloat16"), "of the network's arithmetic"),
    "model.pretrained": Option("", "", "a .safetensors or .pth file with torchvision's names"),
    "loss.entropy_weight": Option(0.0, "[0, inf)", "of the probabilities' entropy (+EM)"),
    "loss.warmup_epochs": Option(-1.0, "", "of cross-entropy alone; negative: the method's own"),
    "optimizer.learning_rate": Option(0.1, "(0, inf)", "peak"),
    "optimizer.momentum": Option(0.9, "[0, 1]"),
    "optimizer.nesterov": Option(True),
    "optimizer.weight_decay": Option(5e-4, "[0, inf)", "added to the gradient, as in PyTorch"),
    "optimizer.schedule": Option("cosine", ("cosine", "linear", "step")),
    "optimizer.warmup_epochs": Option(1.0, "[0, inf)", "linear rise of the learning rate"),
    "optimizer.decay_epochs": Option(25.0, "(0, inf)", "step: multiply this often"),
    "optimizer.decay_factor": Option(0.5, "(0, inf)", "step: multiply by this"),
    "optimizer.average_decay": Option(
        0.0, "[0, 1)", "of moving averages of all weights, which evaluation uses; 0: none"
    ),
    "optimizer.sharded": Option(False, "", "divide the optimizer's state between the devices"),
    "train.epochs": Option(30.0, "(0, 1e6]", "may be fractional"),
    "train.batch_size": Option(128, _COUNT, "over all devices together"),
    "train.microbatches": Option(1, _COUNT, "gradient accumulation: parts of a device's share"),
    "train.on_nonfinite": Option("stop", ("stop", "skip"), "a step that is not finite"),
    "train.nonfinite_budget": Option(10, _SIZE, "steps that may be skipped"),
    "log.every_steps": Option(50, _COUNT),
    "log.calibration_every_epochs": Option(1.0, "(0, 1e6]", "metrics of the calibration split"),
    "checkpoint.every_epochs": Option(1.0, "(0, 1e6]"),
    "checkpoint.keep": Option(3, _COUNT, "the latest so many"),
    # On the calibration split, of the checkpoints that are saved where it is logged.
    "checkpoint.keep_best": Option(1, _SIZE, "and so many with the best value of best_metric"),
    "checkpoint.best_metric": Option("aurc", ("aurc", "accuracy", "negative_log_likelihood")),
    "process.wait_seconds": Option(600.0, "(0, inf)", "for the other processes, each time"),
    "process.watchdog_seconds": Option(600.0, "[0, inf)", "without a step: print all stacks"),
    # The user's alone; empty: nothing is kept. JAX_COMPILATION_CACHE_DIR takes precedence.
    "process.compilation_cache": Option(os.path.join("~", ".cache", "sync_jax_compiled")),
    "profile.steps": Option("", "", "steps to write a trace of, such as 100-110; empty: none"),
    "evaluation.batch_size": Option(1000, "[1, 100000]"),
    **EVALUATION,
    "evaluation.scores": Option((), each="names package.module:SCORE of your own scores"),
}
for _method in METHODS.values():
    FIELDS |= {f"loss.{name}": option for name, option in _method.hyperparameters.items()}


def default_config() -> ConfigDict:
    """Every field with its default, but for the options of backbones, which add their own."""
    config = ConfigDict()
    for field, option in FIELDS.items():
        section, _, name = field.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[name] = option.default
    return config


def find_method(name: str) -> Method:
    """The method of a config's `method`."""
    return find(name, METHODS, Method, "config.method")


def validate(config: ConfigDict) -> None:
    """Adds the hyperparameters that an own method declares, and checks every field.

    Options of backbones are left to `models.complete`, and what depends on the data to
    `data.loading`. InputError names the field, the value and the choices.
    """
    try:
        values = dict(flatten(config.to_dict()))
    except Exception as error:  # of ml_collections: a placeholder that nobody filled in
        raise InputError(f"the config is not complete: {type(error).__name__}: {error}") from error
    for field in FIELDS.keys() - values.keys():
        raise InputError(f"config.{field} is missing; begin with sync_jax.config.default_config()")
    FIELDS["method"].check("config.method", config.method)
    own = {f"loss.{k}": o for k, o in find_method(config.method).hyperparameters.items()}
    for field, option in own.items():
        values.setdefault(field, option.default)
        config.loss[field.removeprefix("loss.")] = values[field]
    options = FIELDS | own
    for field, value in values.items():
        if field in options:
            options[field].check(f"config.{field}", value)
        elif not field.startswith("model."):
            raise InputError(unknown_field(field, options))
    for field in PATHS:
        check_path(f"config.{field}", values[field])
    if not config.data.data_dir:
        raise InputError(
            "config.data.data_dir is empty; it must name the folder of prepared datasets"
        )
    for field in ("optimizer.warmup_epochs", "loss.warmup_epochs"):
        if values[field] >= config.train.epochs:
            raise InputError(
                f"config.{field}={values[field]:g} must be less than "
                f"config.train.epochs={config.train.epochs:g}"
            )


def check_path(name: str, value: str) -> None:
    """Raises InputError for the address of a bucket, and for a null character."""
    if "\0" in value:
        raise InputError(f"{name}={value!r} can be no path")
    if "://" in value:
        raise InputError(
            f"{name}={value} must be a path: locks, renames and appended lines need a file system; "
            "mount the bucket, as launch/tpu.sh does by itself (see launch/README.md), and name "
            "the path below the mount"
        )


def to_json(config: ConfigDict) -> str:
    """The resolved config as strict, stable JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_config(saved: Path) -> dict[str, Any]:
    """A config as nested dicts, from a file that `to_json` wrote."""
    try:
        config = json.loads(saved.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no fields")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{saved} cannot be read: {error}") from error
    return config


# Fields of version 0.1, and 0 as a size there, in terms of today's.
_RENAMED = {f"model.{x}": f"loss.{x}" for x in ("dropout", "dropout_samples")}
_SIZES: dict[str, dict[str, Any]] = {
    "cnn": {"width": 32, "features": 256},
    "vgg16_bn": {"width": 64, "features": 512, "channel_dropout": None, "norm_first": None},
    **{name: {"width": 64, "stem": None} for name in ("resnet18", "resnet34", "resnet50")},
}


# What trainings did that have no such field.
_LATER = {
    "data.fold": "",
    "data.duplicates": "group",
    "data.group": "",
    "data.file_column": "",
    "data.label_column": "",
    "data.unknown_classes": "refuse",
    "loss.prior_source": "class_head",
    "loss.prior_momentum": 0.9,
    "loss.risk_weight": "selection",
    "loss.rank_floor": "target",
    "loss.sync_target": "prior",
    "loss.detach_features": False,
    "loss.logit_prior": "none",
    "loss.views": 1,
    "loss.rank_window": 0,
    "loss.evidence_share": 0.0,
    "loss.label_smoothing": 0.0,
    "loss.logit_norm": 0.0,
    "optimizer.average_decay": 0.0,
}


def upgraded(saved: dict[str, Any]) -> dict[str, Any]:
    """Fields by path of a saved config, of this version or an earlier one, in today's terms."""
    fields = _LATER | dict(flatten(saved))
    if "duplicates" not in saved.get("data", {}) and fields.get("data.name") == "image_folder":
        fields["data.duplicates"] = "keep"  # nothing changes for other datasets
    if fields.pop("train.steps_per_dispatch", None) is None:
        return fields
    sizes = _SIZES.get(str(fields.get("model.name")), {})
    result = {}
    for field, value in fields.items():
        section, _, name = field.partition(".")
        if section == "model" and f"model.{name}" not in {*FIELDS, *_RENAMED}:
            if name not in sizes:
                continue  # another backbone's
            value = value or sizes[name] or value
        result[_RENAMED.get(field, field)] = value
    if result.get("train.on_nonfinite") == "rollback":
        result["train.on_nonfinite"] = "stop"
    return result


def from_saved(saved: dict[str, Any]) -> ConfigDict:
    """A saved config, of this version or 0.1; a field that it lacks has its default."""
    config = default_config()
    config.update_from_flattened_dict(upgraded(saved))
    return config


def config_of_run(run: str) -> ConfigDict:
    """Reads the config of a run's folder, which --mode=evaluate takes where none is given.

    What the folder names is not imported: InputError for names of modules.
    """
    path = Path(run, "config.json")
    if not path.is_file():
        raise InputError(f"{path} is missing: --workdir={run} holds no run, so give a --config")
    try:
        config = from_saved(read_config(path))
        names = {"method": config.method, "model.name": config.model.name}
        names["evaluation.scores"] = ",".join(config.evaluation.scores)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no config of a run: {error}") from error
    if foreign := [f"--config.{field}={name}" for field, name in names.items() if ":" in name]:
        raise InputError(
            f"{path} names modules, which are imported only if you name them: give --config and "
            f"{' '.join(foreign)}"
        )
    return config


def describe_differences(config: ConfigDict, saved: dict[str, Any]) -> list[str]:
    """Fields in which a config and a saved one are different experiments, one phrase each."""
    theirs, ours = upgraded(saved), dict(flatten(json.loads(to_json(config))))
    return [
        f"config.{field} is {theirs.get(field)!r} there and {ours.get(field)!r} here"
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field) and not field.startswith(OPERATIONAL)
    ]


def unknown_field(field: str, known: dict[str, Option] | None = None) -> str:
    """One line on a path such as 'train.epoch' that is none of the known fields."""
    known = FIELDS if known is None else known
    section = field.partition(".")[0]
    near = [x for x in known if x.startswith(f"{section}.")] or sorted(
        {x.partition(".")[0] for x in known}
    )
    return f"config.{field} is no field{suggestion(field, known)}; choose from {', '.join(near)}"
