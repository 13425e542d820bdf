"""The default config, the one place where every field is named and explained, and its checks."""

import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sync_jax.data import catalogue, pictures
from sync_jax.data.images import Layout
from sync_jax.data.parts import calibration_size
from sync_jax.errors import InputError
from sync_jax.methods import METHODS
from sync_jax.models import BACKBONES
from sync_jax.models.pretrained import check_weights_file
from sync_jax.models.resnet import RESNETS

# The coverages of every published table, in percent.
COVERAGES = (100, 99, 98, 97, 95, 90, 85, 80, 75, 70, 60, 50, 40, 30, 20, 10)

PATHS = (
    *("data.data_dir", "data.source", "data.folder", "model.pretrained"),
    "process.compilation_cache",
)

_MOST_VALUES = 1000  # of a list: a report has a row for each

# Fields that may change between a run and its continuation or re-evaluation: they move no weight.
OPERATIONAL = (
    *("data.data_dir", "data.source", "data.workers", "optimizer.sharded"),
    *("train.on_nonfinite", "train.nonfinite_budget", "train.steps_per_dispatch"),
    *("log.", "checkpoint.", "evaluation.", "process.", "profile."),
)


def default_config() -> ConfigDict:
    """Every field with its default; the files in `configs/` change what they must."""
    config = ConfigDict()
    config.method = "sync"  # a name in methods.METHODS
    config.seed = 0  # initialisation, order of the examples, augmentation
    # Coverage that SelectiveNet and SYNC train for, and the operating point in the report.
    config.target_coverage = 0.8

    config.data = ConfigDict()
    config.data.name = "fashion_mnist"  # a name in data.catalogue.NAMES
    config.data.data_dir = os.path.join("~", ".cache", "sync_jax")  # prepared datasets
    config.data.source = ""  # a folder with the upstream files; empty: look for them
    config.data.folder = ""  # image_folder: the pictures, as folder/class/picture
    # Of pictures (imagenet100, stanford_cars, food101, image_folder), in pixels: the network's
    # input; the short side that they are resized to (0: stored_size); the square from the middle of
    # that, which device memory holds and evaluation takes the middle of (0: short_side or
    # image_size).
    config.data.image_size = 64
    config.data.short_side = 0
    config.data.stored_size = 0
    # Training images in the "device"'s memory, as squares on the "disk" and read for each batch, or
    # decoded for each batch on the "host"; "auto": device where they fit, else host.
    config.data.placement = "auto"
    config.data.workers = 0  # host: processes that decode; 0: threads of this one
    config.data.calibration_size = 6000  # held out of the official training split; 0: a tenth
    config.data.split_seed = 0  # of that hold-out; apart from `seed`, so that seeds share it
    config.data.crop_padding = 2  # pixels; 0: no random crop
    config.data.flip = True  # left to right
    config.data.rotation = 0.0  # degrees; 0: none
    # Random crop of this share of the area or more, resized to the whole; 1: none.
    config.data.min_crop_area = 1.0
    config.data.jitter = 0.0  # brightness, contrast, saturation: factors 1 - this to 1 + this
    # Probabilities of doubled sharpness, of grey, of a change of perspective, of 2 bits a channel.
    config.data.sharpen = 0.0
    config.data.grey = 0.0
    config.data.perspective = 0.0
    config.data.posterise = 0.0

    config.model = ConfigDict()
    config.model.name = "cnn"  # a name in models.BACKBONES
    config.model.width = 0  # channels of the first convolution; 0: 32 of the cnn, 64 of others
    config.model.features = 0  # size of the feature vector; 0: 256 of the cnn, 512 of vgg16_bn
    config.model.dtype = "float32"  # of the arithmetic; or "bfloat16", for GPUs and TPUs
    config.model.stem = "cifar"  # resnets: 3 x 3 at full resolution; or "imagenet", at a quarter
    config.model.channel_dropout = True  # vgg16_bn: drops whole channels rather than elements
    config.model.norm_first = False  # vgg16_bn: BatchNorm before ReLU, as torchvision's weights
    # A .safetensors or .pth file with torchvision's names, to begin with; empty: random weights.
    config.model.pretrained = ""
    config.model.dropout = 0.5  # mc_dropout: rate, on the feature vector
    config.model.dropout_samples = 100  # mc_dropout: that evaluation averages over

    # losses.selectivenet_loss and losses.sync_loss read the first six. The SYNC values are
    # provisional: the paper's are not public, and which are best is an open question.
    config.loss = ConfigDict()
    config.loss.coverage_weight = 32.0
    config.loss.alpha = 0.5
    config.loss.prior_power = 3.0
    config.loss.prior_weight = 0.0
    config.loss.sync_weight = 0.5
    config.loss.divergence = "bce"  # or "mse"
    config.loss.payoff = 2.2  # deep_gamblers: of a right answer; above 1, at most the classes
    config.loss.target_momentum = 0.9  # self_adaptive: of the targets; the field's 0.99 on ImageNet
    # ccl_sc: weight and temperature of the contrastive term, keys kept of right and of wrong
    # predictions each, momentum of the encoder that makes them.
    config.loss.contrast_weight = 1.0
    config.loss.contrast_temperature = 0.1
    config.loss.queue_size = 3000
    config.loss.encoder_momentum = 0.999
    # Of any method: weight of the entropy of the class probabilities ("+EM"; the field's is 0.01).
    config.loss.entropy_weight = 0.0
    # How many first epochs minimise the plain cross-entropy instead; negative: the method's own
    # choice: a third of the run for deep_gamblers, half for ccl_sc, none for the others.
    config.loss.warmup_epochs = -1.0

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 0.1  # peak
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"  # or "linear", "step"
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.decay_epochs = 25.0  # "step" only: multiply by decay_factor this often
    config.optimizer.decay_factor = 0.5

    # The optimiser's state divided between the devices instead of copied to each.
    config.optimizer.sharded = False

    config.train = ConfigDict()
    config.train.epochs = 30.0  # may be fractional
    config.train.batch_size = 128  # over all devices together
    # Gradient accumulation: the network sees each device's share of a batch in so many parts.
    config.train.microbatches = 1
    # Steps that the device does for one command of the host, where it holds the images; 0: 8 on
    # accelerators, 1 on CPUs, where it would gain nothing.
    config.train.steps_per_dispatch = 0
    # What a step does whose loss, gradient or parameters are not finite: "stop" the run; "skip":
    # leave everything as it was and go on, no more often than the budget allows.
    config.train.on_nonfinite = "stop"
    config.train.nonfinite_budget = 10

    config.log = ConfigDict()
    config.log.every_steps = 50
    config.log.calibration_every_epochs = 1.0  # accuracy and mean g on the calibration split

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1.0
    config.checkpoint.keep = 3  # the latest so many
    # And so many with the best value on the calibration split of "aurc" (by the softmax response),
    # "accuracy" or "negative_log_likelihood", of those that are saved where it is logged.
    config.checkpoint.keep_best = 1
    config.checkpoint.best_metric = "aurc"

    config.process = ConfigDict()
    config.process.wait_seconds = 600.0  # for the other processes, wherever all must come together
    # Prints what each thread is doing when no step has finished for so long; 0: never.
    config.process.watchdog_seconds = 600.0
    # A folder for what XLA compiled, which later runs take from there; it must be the user's alone.
    # Empty: nothing is kept. JAX's own JAX_COMPILATION_CACHE_DIR goes before it.
    config.process.compilation_cache = os.path.join("~", ".cache", "sync_jax_compiled")

    config.profile = ConfigDict()
    # Steps to write a trace of, for TensorBoard and Perfetto, such as "100-110"; empty: none.
    config.profile.steps = ""

    config.evaluation = ConfigDict()
    config.evaluation.batch_size = 1000
    config.evaluation.coverages = COVERAGES  # percent
    # Certificates: error rates that a user may ask of the answers, each held with confidence
    # 1 - delta over the draw of the calibration split. The defaults are what some thousands of
    # calibration examples can prove (guarantees.calibration_size), at the confidence that people
    # are used to from intervals: one calibration split in twenty may mislead.
    config.evaluation.target_risks = (0.01, 0.02, 0.05)
    config.evaluation.delta = 0.05
    return config


def validate(config: ConfigDict) -> None:
    """Checks every value that a command line or a config file can get wrong.

    Raises:
        InputError: naming the field, the value and the choices.
    """
    ours, theirs = (dict(flatten(x.to_dict())) for x in (default_config(), config))
    for field in theirs.keys() - ours.keys():
        raise InputError(str(unknown_field(f"config.{field}")))
    for field in ours.keys() - theirs.keys():
        raise InputError(f"config.{field} is missing; begin with sync_jax.config.default_config()")
    for field, value in theirs.items():
        kind = type(ours[field])
        accepted = {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,))
        if type(value) not in accepted:
            raise InputError(f"config.{field}={value!r} must be of type {kind.__name__}")
    for field in PATHS:
        check_path(f"config.{field}", _get(config, field))
    _choice(config, "method", METHODS)
    _choice(config, "data.name", catalogue.NAMES)
    _choice(config, "data.placement", ("auto", "device", "disk", "host"))
    _choice(config, "model.name", BACKBONES)
    _choice(config, "model.dtype", ("float32", "bfloat16"))
    _choice(config, "model.stem", ("cifar", "imagenet"))
    _choice(config, "loss.divergence", ("bce", "mse"))
    _choice(config, "optimizer.schedule", ("cosine", "linear", "step"))
    _choice(config, "train.on_nonfinite", ("stop", "skip"))
    _choice(config, "checkpoint.best_metric", ("aurc", "accuracy", "negative_log_likelihood"))

    _integer(config, "seed", low=0, high=2**31 - 1)
    _integer(config, "data.split_seed", low=0, high=2**31 - 1)
    _integer(config, "data.crop_padding", low=0, high=64)
    _integer(config, "data.calibration_size", low=0)
    _integer(config, "data.image_size", low=8, high=1024)
    _integer(config, "data.short_side", low=0, high=1024)
    _integer(config, "data.stored_size", low=0, high=1024)
    _integer(config, "data.workers", low=0, high=256)
    for field in PATHS:
        if "\0" in _get(config, field):
            raise InputError(f"config.{field}={_get(config, field)!r} can be no path")
    if not config.data.data_dir:
        raise InputError(
            "config.data.data_dir is empty; it must name the folder of prepared datasets"
        )
    layout = Layout.of(config.data)
    if not layout.size <= layout.stored <= layout.short_side:
        raise InputError(
            f"config.data.image_size={layout.size}, stored_size={layout.stored} and "
            f"short_side={layout.short_side} must not decrease in this order"
        )
    # The field's networks have 64 and 4,096; sixteen times as many would not fit into any device.
    _integer(config, "model.width", low=0, high=1024)
    _integer(config, "model.features", low=0, high=65_536)
    if config.model.name in RESNETS and config.model.features:
        raise InputError(
            f"config.model.features={config.model.features}: the size of {config.model.name}'s "
            "feature vector follows from config.model.width; leave it at 0"
        )
    check_weights_file(config.model.pretrained, config.model.name)
    _integer(config, "model.dropout_samples", low=1, high=10_000)
    _integer(config, "loss.queue_size", low=1, high=1_000_000)
    _integer(config, "train.batch_size", low=1)
    _integer(config, "log.every_steps", low=1)
    _integer(config, "train.microbatches", low=1)
    _integer(config, "train.steps_per_dispatch", low=0, high=1000)
    _integer(config, "train.nonfinite_budget", low=0)
    _integer(config, "checkpoint.keep", low=1)
    _integer(config, "checkpoint.keep_best", low=0)
    _integer(config, "evaluation.batch_size", low=1, high=100_000)

    unit = _range("in (0, 1]", lambda x: 0 < x <= 1)
    fraction = _range("in [0, 1]", lambda x: 0 <= x <= 1)
    open_unit = _range("in (0, 1)", lambda x: 0 < x < 1)
    positive = _range("above 0", lambda x: x > 0)
    non_negative = _range("at least 0", lambda x: x >= 0)
    unit(config, "target_coverage")
    _range("in (0, 1]", lambda x: 0 < x <= 1)(config, "data.min_crop_area")
    for field in ("jitter", "sharpen", "grey", "perspective", "posterise"):
        fraction(config, f"data.{field}")
    if config.data.name == pictures.FOLDER and not config.data.folder:
        raise InputError(
            "config.data.folder is empty; say --config.data.folder=FOLDER, which holds one folder "
            "of pictures per class"
        )
    _range("in [0, 180]", lambda x: 0 <= x <= 180)(config, "data.rotation")
    fraction(config, "loss.alpha")
    fraction(config, "optimizer.momentum")
    open_unit(config, "evaluation.delta")
    for field in ("optimizer.learning_rate", "optimizer.decay_epochs", "optimizer.decay_factor"):
        positive(config, field)
    positive(config, "loss.contrast_temperature")
    for field in ("train.epochs", "checkpoint.every_epochs", "log.calibration_every_epochs"):
        _range("above 0 and at most 1e6", lambda x: 0 < x <= 1e6)(config, field)
    for field in ("optimizer.weight_decay", "optimizer.warmup_epochs"):
        non_negative(config, field)
    for field in ("coverage_weight", "prior_power", "prior_weight", "sync_weight"):
        non_negative(config, f"loss.{field}")
    positive(config, "process.wait_seconds")
    non_negative(config, "process.watchdog_seconds")
    non_negative(config, "loss.contrast_weight")
    non_negative(config, "loss.entropy_weight")
    _range("below the run's epochs, or negative", lambda x: True)(config, "loss.warmup_epochs")
    for field in ("loss.target_momentum", "loss.encoder_momentum", "model.dropout"):
        _range("in [0, 1)", lambda x: 0 <= x < 1)(config, field)
    _each(config, "evaluation.coverages", "percentages in (0, 100]", lambda x: 0 < x <= 100)
    _each(
        config,
        "evaluation.target_risks",
        "error rates in (0, 1), from 1e-6",
        lambda x: 1e-6 <= x < 1,
    )

    _range("above 1", lambda x: x > 1)(config, "loss.payoff")
    for field, value in ours.items():  # the devices compute in float32
        if isinstance(value, float):
            _range("of 1e30 at most", lambda x: abs(x) <= 1e30)(config, field)
    for field in ("optimizer.warmup_epochs", "loss.warmup_epochs"):
        if (epochs := _get(config, field)) >= config.train.epochs:
            raise InputError(
                f"config.{field}={epochs:g} must be less than "
                f"config.train.epochs={config.train.epochs:g}"
            )
    check_sizes(config)


def check_path(name: str, value: str) -> None:
    """Refuses the address of a bucket: everything is read and written through a file system.

    Raises:
        InputError: saying what to do instead.
    """
    if "://" in value:
        raise InputError(
            f"{name}={value} must be a path: locks, renames and appended lines need a file system; "
            "mount the bucket, as launch/tpu.sh does by itself (see launch/README.md), and name "
            "the path below the mount"
        )


def check_sizes(config: ConfigDict) -> None:
    """Checks what depends on how large the dataset is.

    Of a folder of pictures that is not prepared, what the files' names tell.

    Raises:
        InputError: naming the field, the value and what would do.
    """
    info = catalogue.dataset_info(config.data)
    if info is None:
        info = pictures.listed_info(config.data)
    if info is None:
        return
    if config.method == "deep_gamblers" and config.loss.payoff > info.num_classes:
        raise InputError(
            f"config.loss.payoff={config.loss.payoff:g} must be at most the {info.num_classes} "
            "classes"
        )
    held_out = calibration_size(config.data, info.num_train)
    train_size = info.num_train - held_out
    if train_size < info.num_classes or held_out < info.num_classes:
        raise InputError(
            f"config.data.calibration_size={config.data.calibration_size}: {info.name} has "
            f"{info.num_train} training examples of {info.num_classes} classes; both parts need "
            f"one of each, so use {info.num_classes} to {info.num_train - info.num_classes}"
        )
    if config.train.batch_size > train_size:
        raise InputError(
            f"config.train.batch_size={config.train.batch_size} is more than the {train_size} "
            f"training examples"
        )
    if config.train.epochs * train_size >= 2**31:  # data.resident counts positions in 32 bits
        raise InputError(
            f"config.train.epochs={config.train.epochs:g} must be less than "
            f"{2**31 / train_size:.0f} with {train_size} training examples"
        )


def to_json(config: ConfigDict) -> str:
    """The resolved config as strict, stable JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_config(saved: Path) -> dict[str, Any]:
    """A config as nested dicts, from a file that holds what `to_json` makes.

    Raises:
        InputError: the file is damaged.
    """
    try:
        config = json.loads(saved.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no fields")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{saved} cannot be read: {error}") from error
    return config


def describe_differences(config: ConfigDict, saved: dict[str, Any]) -> list[str]:
    """Fields in which a config and a saved one are different experiments, one phrase each.

    Args:
        config: this one.
        saved: the other, as nested dicts.
    """
    theirs = dict(flatten(saved))
    ours = dict(flatten(json.loads(to_json(config))))
    return [
        f"config.{field} is {theirs.get(field)!r} there and {ours.get(field)!r} here"
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field) and not field.startswith(OPERATIONAL)
    ]


def unknown_field(path: str) -> str | None:
    """What is wrong with a path such as 'config.train.epochs'; None where it names a field."""
    node: Any = default_config()
    *parents, last = path.split(".")
    where = parents[0] if parents else last
    for name in (*parents[1:], last):
        if not isinstance(node, ConfigDict):
            return f"{path}: {where} is a value and has no fields"
        if name not in node:
            return (
                f"{path}: {where} has no field {name!r}{suggestion(name, node)}; "
                f"choose from {', '.join(node)}"
            )
        node, where = node[name], f"{where}.{name}"
    if isinstance(node, ConfigDict):
        return f"{path} is no value; choose from its fields {', '.join(node)}"
    return None


def suggestion(word: str, choices: Collection[str]) -> str:
    """' (did you mean x?)' when one of the choices is close, else ''."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their path, such as 'train.epochs'."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _get(config: ConfigDict, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = value[name]
    return value


def _short(value: int) -> str:
    """In digits; of very many only how many bits they are."""
    return f"{value}" if value.bit_length() < 128 else f"(a number of {value.bit_length()} bits)"


def _choice(config: ConfigDict, field: str, choices: Collection[str]) -> None:
    value = _get(config, field)
    if value not in choices:
        raise InputError(
            f"config.{field}={value!r} is unknown{suggestion(str(value), choices)}; "
            f"choose from {', '.join(sorted(choices))}"
        )


def _integer(config: ConfigDict, field: str, *, low: int, high: int | None = None) -> None:
    value = _get(config, field)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"config.{field}={_short(value)} must be {bounds}")


def _range(bounds: str, accepts: Callable[[float], bool]) -> Callable[[ConfigDict, str], None]:
    def check(config: ConfigDict, field: str) -> None:
        value = _get(config, field)
        # An integer in a float's place can be too large for one.
        if abs(value) > sys.float_info.max or not (math.isfinite(value) and accepts(value)):
            shown = f"{value}" if isinstance(value, float) else _short(value)
            raise InputError(f"config.{field}={shown} must be a finite number {bounds}")

    return check


def _each(config: ConfigDict, field: str, bounds: str, accepts: Callable[[float], bool]) -> None:
    values = _get(config, field)
    if len(values) > _MOST_VALUES:
        raise InputError(f"config.{field} has {len(values)} values; at most {_MOST_VALUES} will do")
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
    if not values or not numbers or not all(accepts(x) for x in values):
        raise InputError(f"config.{field}={tuple(values)} must be a list of {bounds}")
    if len(set(values)) < len(values):
        raise InputError(f"config.{field}={tuple(values)} names a value twice")
