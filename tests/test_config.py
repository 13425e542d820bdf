import builtins
import json
import math
import os
import runpy
from pathlib import Path

import pytest

from sync_jax.config import (
    OPERATIONAL,
    default_config,
    describe_differences,
    read_config,
    to_json,
    unknown_field,
    validate,
)
from sync_jax.errors import InputError, suggestion
from sync_jax.models import complete

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))

# field: (bad values, what the message says would do)
COUNT = (0, -3)
NAN, INFINITY = math.nan, math.inf
BAD = {
    "method": (
        ("selective", ""),
        "choose from aurc, ccl_sc, ce, deep_gamblers, mc_dropout, selectivenet, self_adaptive",
    ),
    "loss.divergence": (("kl",), "choose from bce, mse"),
    "loss.prior_source": (
        ("head", ""),
        "choose from agreement, auxiliary_head, average, class_head, margin, shuffled, true_class",
    ),
    "loss.prior_momentum": ((-0.1, 1.0, NAN), "in [0, 1)"),
    "loss.risk_weight": (("value",), "choose from equal, rank, selection"),
    "loss.rank_floor": (("risk",), "choose from error, target"),
    "loss.sync_target": (("wrong",), "choose from correctness, prior"),
    "loss.logit_prior": (("learned",), "choose from fixed, learnt, none"),
    "loss.views": ((0, 3), "between 1 and 2"),
    "loss.rank_window": ((-1, 1_000_001), "between 0 and 1000000"),
    "loss.evidence_share": ((-0.1, 1.0, NAN), "in [0, 1)"),
    "loss.label_smoothing": ((-0.1, 1.0, NAN), "in [0, 1)"),
    "loss.logit_norm": ((-0.1, NAN, INFINITY), "at least 0"),
    "optimizer.schedule": (("constant",), "choose from cosine, linear, step"),
    "seed": ((-1, 2**31), "between 0 and 2147483647"),
    "data.split_seed": ((-1, 2**31), "between 0 and 2147483647"),
    "data.duplicates": (("drop", ""), "choose from group, keep, refuse"),
    "data.unknown_classes": (("keep", ""), "choose from drop, refuse"),
    "data.crop_padding": ((-1, 65), "between 0 and 64"),
    "data.image_size": ((0, 7, 1025), "between 8 and 1024"),
    "data.min_crop_area": ((0.0, -0.1, 1.1, NAN), "in (0, 1]"),
    "data.jitter": ((-0.1, 1.1, NAN), "in [0, 1]"),
    "data.rotation": ((-1.0, 181.0, NAN), "in [0, 180]"),
    "data.calibration_size": ((-1, -3), "at least 0"),
    "model.dtype": (("float16", "bf16"), "choose from bfloat16, float32"),
    "train.batch_size": (COUNT, "at least 1"),
    "log.every_steps": (COUNT, "at least 1"),
    "checkpoint.keep": (COUNT, "at least 1"),
    "evaluation.batch_size": (COUNT, "between 1"),
    "target_coverage": ((0.0, -0.1, 1.01, NAN, INFINITY), "in (0, 1]"),
    "loss.alpha": ((-0.1, 1.1, NAN), "in [0, 1]"),
    "optimizer.momentum": ((-0.1, 1.1, NAN), "in [0, 1]"),
    "evaluation.delta": ((0.0, 1.0, NAN), "in (0, 1)"),
    "optimizer.learning_rate": ((0.0, -1.0, NAN, INFINITY), "above 0"),
    "optimizer.average_decay": ((-0.1, 1.0, NAN), "in [0, 1)"),
    "optimizer.decay_epochs": ((0.0, NAN, INFINITY), "above 0"),
    "optimizer.decay_factor": ((0.0, -0.5, NAN), "above 0"),
    "train.epochs": ((0.0, -1.0, NAN, INFINITY), "in (0, 1e6]"),
    "checkpoint.every_epochs": ((0.0, NAN, INFINITY), "in (0, 1e6]"),
    "log.calibration_every_epochs": ((0.0, NAN, INFINITY), "in (0, 1e6]"),
    "checkpoint.keep_best": ((-1,), "at least 0"),
    "checkpoint.best_metric": (("auc", ""), "choose from accuracy, aurc, negative_log_likelihood"),
    "train.microbatches": ((0, -2), "at least 1"),
    "train.on_nonfinite": (("ignore", "rollback", ""), "choose from skip, stop"),
    "train.nonfinite_budget": ((-1,), "at least 0"),
    "process.wait_seconds": ((0.0, -1.0, NAN, INFINITY), "above 0"),
    "process.watchdog_seconds": ((-1.0, NAN, INFINITY), "at least 0"),
    "data.placement": (("gpu", ""), "choose from auto, device, disk, host"),
    "data.workers": ((-1, 257), "between 0 and 256"),
    "data.short_side": ((-1, 1025), "between 0 and 1024"),
    "data.stored_size": ((-1, 1025), "between 0 and 1024"),
    "data.sharpen": ((-0.1, 1.1, NAN), "in [0, 1]"),
    "data.grey": ((-0.1, 1.1, NAN), "in [0, 1]"),
    "data.perspective": ((-0.1, 1.1, NAN), "in [0, 1]"),
    "data.posterise": ((-0.1, 1.1, NAN), "in [0, 1]"),
    "optimizer.weight_decay": ((-1e-9, NAN, INFINITY), "at least 0"),
    "optimizer.warmup_epochs": ((-1.0, NAN, INFINITY), "at least 0"),
    "loss.coverage_weight": ((-1.0, NAN, INFINITY), "at least 0"),
    "loss.prior_power": ((-1.0, NAN, INFINITY), "at least 0"),
    "loss.prior_weight": ((-1.0, NAN, INFINITY), "at least 0"),
    "loss.sync_weight": ((-1.0, NAN, INFINITY), "at least 0"),
    "loss.dropout": ((-0.1, 1.0, NAN), "in [0, 1)"),
    "loss.dropout_samples": ((0, -3, 10_001), "between 1 and 10000"),
    "loss.entropy_weight": ((-0.1, NAN, INFINITY), "at least 0"),
    "loss.warmup_epochs": ((NAN, INFINITY, -1e31), "finite number of 1e+30 at most"),
    "loss.target_momentum": ((-0.1, 1.0, NAN), "in [0, 1)"),
    "loss.encoder_momentum": ((-0.1, 1.0, NAN), "in [0, 1)"),
    "loss.contrast_weight": ((-0.1, NAN, INFINITY), "at least 0"),
    "loss.contrast_temperature": ((0.0, -0.1, NAN, INFINITY), "above 0"),
    "loss.queue_size": ((0, -3, 1_000_001), "between 1 and 1000000"),
    "loss.payoff": ((1.0, 0.0, NAN), "above 1"),
    "evaluation.coverages": (
        ((), (0,), (101,), (50, NAN), ("half",), (True,)),
        "must be a list of percentages in (0, 100]",
    ),
    "evaluation.scores": ((("a:b", 1), ("a:b", "a:b")), ""),
    "evaluation.target_risks": (
        ((), (0.0,), (1e-7,), (1.0,), (NAN,), ("1%",)),
        "must be a list of error rates in [1e-6, 1)",
    ),
}
# Any value of their type will do.
FREE = {
    "data.folder",
    "data.fold",
    "data.group",
    "data.file_column",
    "data.label_column",
    "data.data_dir",
    "data.source",
    "process.compilation_cache",
    "data.flip",
    "loss.detach_features",
    "optimizer.nesterov",
    "optimizer.sharded",
    # Checked where they are used: by data.registry, models, models.pretrained and profiling.
    *("data.name", "model.name", "model.pretrained", "profile.steps"),
}

GOOD = [
    ("seed", 2**31 - 1), ("target_coverage", 1.0), ("target_coverage", 1e-3), ("loss.alpha", 0.0),
    ("loss.alpha", 1.0), ("optimizer.momentum", 0.0), ("data.crop_padding", 0),
    ("data.calibration_size", 10),
    ("loss.coverage_weight", 0.0), ("loss.prior_power", 0.0), ("train.epochs", 1.5),
    ("evaluation.coverages", (100,)), ("evaluation.coverages", (33.3, 50)),
    ("evaluation.target_risks", (0.5,)), ("optimizer.warmup_epochs", 0.0), ("method", "ce"),
    ("loss.payoff", 10.0), ("loss.target_momentum", 0.0), ("loss.warmup_epochs", 29.0),
    ("train.batch_size", 54_000), ("optimizer.schedule", "step"), ("loss.alpha", 1),
]  # fmt: skip


def fields(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def changed(**changes):
    """The default config with some fields changed; __ stands for the dot."""
    config = default_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def with_field(field, value):
    return changed(**{field.replace(".", "__"): value})


def message(config):
    with pytest.raises(InputError) as error:
        validate(config)
    text = str(error.value)
    assert "\n" not in text
    return text


# --- validate -------------------------------------------------------------------------------------


def test_the_default_is_valid():
    assert validate(default_config()) is None  # raises otherwise


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_are_valid(path):
    config = runpy.run_path(str(path))["get_config"]()
    validate(config)
    assert complete(config.model) == []
    assert runpy.run_path(str(path))["__doc__"]


def test_validation_touches_no_disk(monkeypatch):
    def touched(*arguments, **options):
        raise AssertionError(f"the disk is touched: {arguments}")

    config = default_config()
    config.data.name, config.data.folder = "image_folder", "pictures"
    config.model.pretrained, config.data.source = "w.pth", "files"
    for module, name in [(builtins, "open"), *((os, x) for x in ("stat", "scandir", "listdir"))]:
        monkeypatch.setattr(module, name, touched)
    validate(config)


def test_every_field_is_checked():
    """A new field needs an entry in BAD, or in FREE when nothing can be wrong with it."""
    assert set(fields(default_config())) == BAD.keys() | FREE
    assert not BAD.keys() & FREE


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [(field, value, choices) for field, (values, choices) in BAD.items() for value in values],
)
def test_a_bad_value_gets_its_field_its_value_and_the_choices(field, value, choices):
    text = message(with_field(field, value))
    assert text.startswith(f"config.{field}=")
    shown = text.removeprefix(f"config.{field}=")
    assert shown.startswith((str(value), repr(value)))
    assert choices in text


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_values_at_the_bounds_are_accepted(field, value):
    assert validate(with_field(field, value)) is None


def test_a_warm_up_must_end_before_the_run():
    for field in ("loss.warmup_epochs", "optimizer.warmup_epochs"):
        assert f"config.{field}=30 must be less than" in message(with_field(field, 30.0))


def test_a_typo_gets_a_suggestion():
    assert "did you mean 'selectivenet'?" in message(changed(method="selectvenet"))
    assert "did you mean" not in message(changed(method="zzz"))


@pytest.mark.parametrize("field", ["evaluation.coverages", "evaluation.target_risks"])
def test_a_value_named_twice(field):
    text = message(with_field(field, (0.5, 0.1, 0.5)))
    assert text == f"config.{field}=(0.5, 0.1, 0.5) names a value twice"


# --- JSON and differences -------------------------------------------------------------------------


def test_json_is_strict_stable_and_complete():
    text = to_json(default_config())
    assert text == to_json(default_config())
    assert text.endswith("}\n")
    decoded = json.loads(text, parse_constant=pytest.fail)
    assert set(fields(decoded)) == set(fields(default_config()))
    assert decoded["optimizer"]["weight_decay"] == 5e-4
    assert decoded["evaluation"]["coverages"][:3] == [100, 99, 98]
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(changed(target_coverage=NAN))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(default_config()))
    return path


def test_a_config_does_not_differ_from_itself(saved):
    assert describe_differences(default_config(), read_config(saved)) == []


def test_differences_are_named(saved):
    config = changed(seed=1, loss__divergence="mse", train__epochs=2.0)
    assert describe_differences(config, read_config(saved)) == [
        "config.loss.divergence is 'bce' there and 'mse' here",
        "config.seed is 0 there and 1 here",
        "config.train.epochs is 30.0 there and 2.0 here",
    ]


def test_which_fields_make_another_experiment(saved):
    """Every field does, but those that move no weight."""
    operational = {
        "data.data_dir", "data.source", "data.folder", "data.workers", "log.every_steps",
        "log.calibration_every_epochs",
        "checkpoint.every_epochs", "checkpoint.keep", "checkpoint.keep_best",
        "checkpoint.best_metric", "process.wait_seconds", "process.watchdog_seconds",
        "process.compilation_cache", "profile.steps",
        "optimizer.sharded", "train.on_nonfinite", "train.nonfinite_budget",
        "evaluation.batch_size",
        "evaluation.coverages", "evaluation.target_risks", "evaluation.delta", "evaluation.scores",
    }  # fmt: skip
    assert {field for field in fields(default_config()) if field.startswith(OPERATIONAL)} == (
        operational
    )
    for field in fields(default_config()):
        value = default_config()
        for name in field.split("."):
            value = value[name]
        other = {str: "other", bool: not value, tuple: ("7",)}.get(type(value))
        config = with_field(field, value + 1 if other is None else other)
        differences = describe_differences(config, read_config(saved))
        assert len(differences) == (field not in operational), field
        assert all(difference.startswith(f"config.{field} ") for difference in differences)


def test_fields_that_only_one_side_has(saved):
    theirs = json.loads(saved.read_text())
    del theirs["loss"]["sync_weight"]
    theirs["loss"]["temperature"] = 2.0
    theirs["extra"] = {"x": 1}
    saved.write_text(json.dumps(theirs))
    assert describe_differences(default_config(), read_config(saved)) == [
        "config.extra.x is 1 there and None here",
        "config.loss.sync_weight is None there and 0.5 here",
        "config.loss.temperature is 2.0 there and None here",
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b"3"])
def test_a_damaged_file(saved, content):
    saved.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        describe_differences(default_config(), read_config(saved))


# --- Unknown fields -------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "expected"), [
    ("train.epoch",
     "config.train.epoch is no field (did you mean 'train.epochs'?); choose from train.epochs, "
     "train.batch_size, train.microbatches, train.on_nonfinite, train.nonfinite_budget"),
    ("qqq.x",
     "config.qqq.x is no field; choose from checkpoint, data, evaluation, log, "
     "loss, method, model, optimizer, process, profile, seed, target_coverage, train"),
])  # fmt: skip
def test_what_is_wrong_with_a_path(path, expected):
    assert unknown_field(path) == expected


def test_a_field_that_nobody_declares_is_refused():
    """The command line accepts any field, so that methods can declare their own."""
    assert message(with_field("train.epoch", 3)) == unknown_field("train.epoch")
    assert "did you mean 'loss.alpha'?" in message(with_field("loss.alhpa", 0.3))


def test_suggestion():
    assert suggestion("cosin", ("cosine", "linear")) == " (did you mean 'cosine'?)"
    assert suggestion("q", ("cosine", "linear")) == ""


# --- Configs of version 0.1 -----------------------------------------------------------------------


def test_a_config_without_todays_options_trained_as_their_first_defaults_do():
    """Those of sync, ce and the optimizer; test_losses.py shows that they change nothing."""
    older = json.loads(to_json(default_config()))
    del older["optimizer"]["average_decay"]
    for name in (
        *("prior_source", "prior_momentum", "risk_weight", "sync_target", "detach_features"),
        *(
            "logit_prior",
            "views",
            "rank_window",
            "evidence_share",
            "rank_floor",
            "label_smoothing",
            "logit_norm",
        ),
    ):
        del older["loss"][name]
    assert describe_differences(default_config(), older) == []
    assert describe_differences(changed(loss__risk_weight="rank"), older) == [
        "config.loss.risk_weight is 'selection' there and 'rank' here"
    ]


def test_an_older_config_in_todays_terms():
    """As version 0.1 wrote it: sizes of 0, options of every backbone, dropout in `model`."""
    older = json.loads(to_json(default_config()))
    older["train"] |= {"steps_per_dispatch": 8, "on_nonfinite": "rollback"}
    older["model"] |= {
        "width": 0, "features": 0, "stem": "cifar", "channel_dropout": True, "norm_first": False,
    }  # fmt: skip
    for name in ("dropout", "dropout_samples"):
        older["model"][name] = older["loss"].pop(name)
    del older["evaluation"]["scores"]
    config = default_config()
    config.model.update({"width": 32, "features": 256})
    assert describe_differences(config, older) == []
    config.model.width = 16
    assert describe_differences(config, older) == ["config.model.width is 32 there and 16 here"]
    older["model"]["name"] = config.model.name = "vgg16_bn"
    config.model.update({"width": 64, "features": 512, "channel_dropout": True})
    config.model.norm_first = False
    assert describe_differences(config, older) == []
