"""Trains, calibrates and evaluates a selective classifier, and writes its report.

Train on Fashion-MNIST, in about two minutes on two CPU cores:
  python -m sync_jax.main --config=quickstart
Train on your own pictures, in one folder per class:
  python -m sync_jax.main --config=image_folder --config.data.folder=pictures
Go on with a training that was stopped: give the same command again.
  python -m sync_jax.main --config=quickstart
Make the report of a finished run anew:
  python -m sync_jax.main --mode=evaluate --workdir=runs/quickstart-sync-seed0
Train every combination of some values, and compare them:
  python -m sync_jax.main --config=quickstart --mode=sweep --vary=seed=0,1,2
Evaluate predictions of any program:
  python -m sync_jax.main --mode=evaluate --predictions=calibration.npz,test.npz
Compare finished runs in one table:
  python -m sync_jax.main --mode=compare --runs='runs/quickstart-*'

--helpshort lists all modes and options, docs/quickstart.md explains them.

Exit status: 0 done, 1 training failed, 2 bad config or input (nothing is
written), 75 stopped by SIGTERM with its state saved, 130 interrupted.
"""

import io
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sync_jax.runtime.config_file import RUN, ConfigFile
from sync_jax.runtime.console import printable
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.runtime.signals import ending_at_ctrl_c

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "An installed config, such as quickstart, or a Python file with get_config(); --config.x.y=z "
    "changes a field.",
    # Methods and backbones declare fields of their own, which config.validate checks.
    lock_config=False,
    accept_new_attributes=True,
)
flags.FLAGS["config"].parser = ConfigFile()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run. Default: runs/<config>-<method>-seed<seed>; of a sweep, which makes such "
    "folders in it, runs.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        "prepare",
        "train",
        "evaluate",
        "predict",
        "export",
        "serve",
        "sweep",
        "labels",
        "compare",
        "ensemble",
        "check",
        "methods",
        "clean",
        "help",
    ],
    "prepare: obtain and convert the dataset. train: prepare, train or resume, calibrate, evaluate "
    "and report. evaluate: make the report of the finished run in --workdir anew, with other "
    "--config.evaluation.* values, or on the pictures of another --config.data.folder, or that of "
    "--predictions; it needs no --config. predict: answer or abstain for the pictures of --input. "
    "export: write the classifier to --output, to be used without the training part. serve: answer "
    "over HTTP. sweep: train every combination of the "
    "--vary values. labels: train on all but one of --folds parts in turn, and list the training "
    "examples whose label is probably wrong. compare: one table of the --runs. ensemble: evaluate "
    "the mean of their probabilities. check: say whether the options and the config are good, "
    "without data or devices. methods: list methods, scores and backbones with their options. "
    "clean: list what --config.data.data_dir holds, or remove what --remove names. help: show the "
    "most needed commands.",
)
_REMOVE = flags.DEFINE_list(
    "remove", [], "clean: prepared data sets and downloads to remove, as --mode=clean lists them."
)
_RUNS = flags.DEFINE_list(
    "runs", [], "compare, ensemble: folders of finished runs, or patterns such as 'runs/x-*'."
)
_PREDICTIONS = flags.DEFINE_list(
    "predictions",
    [],
    "evaluate: files of predictions that any program made, of the calibration split and the test "
    "split, in place of a run; docs/evaluation.md says what they hold.",
)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "predict: a folder of pictures, one picture, a .txt with a path per line, or an array in .npy.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "predict: a .csv, .jsonl or .parquet. export: a folder."
)
_ARTIFACT = flags.DEFINE_string(
    "artifact", None, "check: an exported classifier, to be compared with the run in --workdir."
)
_COVERAGE = flags.DEFINE_float(
    "coverage", None, "predict, export, serve: answer for this share, such as 0.8."
)
_RISK = flags.DEFINE_float(
    "risk", None, "predict, export, serve: answer where at most this share is certified wrong."
)
_DELTA = flags.DEFINE_float("delta", 0.05, "The chance that the certificate of --risk fails.")
_COST = flags.DEFINE_list(
    "cost", None, "predict, export, serve: prices of an error and of an abstention, such as 10,1."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "serve: the port.", 0, 65535)
_VARY = flags.DEFINE_multi_string(
    "vary", [], "sweep: a field and its values, such as seed=0,1,2; may be given repeatedly."
)
_FOLDS = flags.DEFINE_integer(
    "folds", 5, "labels: parts of the training split, each judged by a network of the others.", 2
)
_MIXED = flags.DEFINE_bool(
    "mixed", False, "compare, ensemble: also runs that differ in data, network or schedule."
)
_SCORES = flags.DEFINE_list(
    "scores", [], "compare, ensemble: scores of yours in the runs, as package.module:NAME."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT, a free port of process 0's host, where several processes meet. They run the same "
    "command but for --process. On TPU slices and under Slurm's srun these three are not needed.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.")


def main(arguments: list[str]) -> None:
    """Does what --mode says."""
    if len(arguments) > 1:
        _stop(f"unexpected argument {arguments[1]!r}; every option begins with --", 2)
    # Imported here, for --helpshort need not wait for it.
    from sync_jax import errors
    from sync_jax.runtime.signals import ending_at_sigterm

    try:
        with ending_at_sigterm():
            _do()
    except errors.InputError as error:
        _stop(error, 2)
    except errors.NonFiniteError as error:
        _stop(f"training stopped at {error}", 1)
    except (errors.FailedError, errors.WriteError) as error:
        _stop(error, 1)
    except errors.TerminatedError as error:
        _stop(f"{error}; the same command goes on from there", 75)
    except BrokenPipeError:  # whoever read our lines, such as head, has ended
        os._exit(1)
    except OSError as error:  # what no one expected: a disk that is full, a folder that vanished
        where = error.filename or f"a file of --workdir={_WORKDIR.value or 'runs'}"
        _stop(f"{where} cannot be used: {error.strerror or error}", 1)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "memory" not in str(error):
            raise
        _stop(
            f"a device's memory is full ({str(error)[:200]}); smaller config.train.batch_size, "
            "config.evaluation.batch_size or model, or more config.train.microbatches, take less",
            1,
        )


def _do() -> None:
    mode = _MODE.value
    if mode == "help" or len(sys.argv) == 1:
        print((__doc__ or "").strip())
        return
    if mode == "methods":
        from sync_jax import listing

        print(listing.describe())
        return
    if _PREDICTIONS.value:
        _evaluate_given(mode)
        return
    _check_belongs(mode)
    if mode in ("predict", "export", "serve") or _ARTIFACT.value:
        _deploy(mode)
        return
    from sync_jax.config import check_path, validate

    for name, path in [("--workdir", _WORKDIR.value), *(("--runs", x) for x in _RUNS.value)]:
        check_path(name, path or "")
    if mode in ("compare", "ensemble"):
        from sync_jax.evaluation.comparison import compare, ensemble
        from sync_jax.runtime.sharding import check_devices

        check_devices()  # a report names them
        do = compare if mode == "compare" else ensemble
        out = Path(_WORKDIR.value or f"runs/{mode}")
        do(_RUNS.value, out, mixed=_MIXED.value, scores=_SCORES.value)
        return
    _check_options(mode)
    config = _CONFIG.value
    if not flags.FLAGS["config"].present:
        _stop("--config is missing; for example --config=quickstart", 2)
    if mode == "clean":
        from sync_jax.data import registry
        from sync_jax.data.prepare import cache

        validate(config)
        cache.clean(config.data.data_dir, _REMOVE.value, registry.DATASETS)
        return
    from sync_jax import trainer
    from sync_jax.runtime import processes
    from sync_jax.runtime.console import say
    from sync_jax.runtime.signals import ending_at_sigterm

    left_out = trainer.resolve(config)
    if mode == "check":
        from sync_jax import sweep

        for _, run in sweep.combinations(config, _VARY.value, name="") if _VARY.value else ():
            trainer.resolve(run)
        say("the options and the config are good")
        return
    processes.initialize(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, seconds=config.process.wait_seconds
    )
    for line in left_out:
        say(line)
    with ending_at_sigterm(processes.outlast_others):
        _do_together(mode, config)


def _check_belongs(mode: str) -> None:
    """Refuses an option on a trained classifier in another mode."""
    for name, value, modes in (
        ("artifact", _ARTIFACT.value, ("check",)),
        ("input", _INPUT.value, ("predict",)),
        ("output", _OUTPUT.value, ("predict", "export")),
        ("coverage", _COVERAGE.value, ("predict", "export", "serve")),
        ("risk", _RISK.value, ("predict", "export", "serve")),
        ("cost", _COST.value, ("predict", "export", "serve")),
    ):
        if value is not None and mode not in modes:
            _stop(f"--{name} belongs to --mode={' and --mode='.join(modes)}", 2)


def _evaluate_given(mode: str) -> None:
    """Evaluates files of predictions; without JAX, if no field of a config is given."""
    from sync_jax.evaluation.given import evaluate_logits

    if mode != "evaluate":
        _stop("--predictions belongs to --mode=evaluate", 2)
    if len(_PREDICTIONS.value) > 2:
        _stop("--predictions names one or two files, for calibration and for test", 2)
    options: dict[str, Any] = {}
    if flags.FLAGS["config"].present:
        from sync_jax.config import validate

        config = _CONFIG.value
        validate(config)
        options = {x: config.evaluation[x] for x in ("coverages", "target_risks", "delta")}
        options["target_coverage"] = config.target_coverage
    try:
        evaluate_logits(
            *_PREDICTIONS.value,
            workdir=Path(_WORKDIR.value or "runs/predictions"),
            verbose=True,
            **options,
        )
    except ValueError as error:
        _stop(f"--predictions={','.join(_PREDICTIONS.value)}: {error}", 2)


def _deploy(mode: str) -> None:
    """Uses a trained classifier: that of the run, or of the export, in --workdir."""
    from sync_jax.runtime.console import say

    if not _WORKDIR.value:
        _stop(f"--mode={mode} needs --workdir, the folder of a finished run", 2)
    if mode == "check":
        from sync_jax.predictor import check_artifact

        assert _ARTIFACT.value

        say(check_artifact(_WORKDIR.value, _ARTIFACT.value))
        return
    classifier = _classifier(_WORKDIR.value)
    say(repr(classifier))
    if mode == "predict":
        _predict(classifier)
    elif mode == "serve":
        try:
            from sync_jax.deploy.serve import serve
        except ImportError as error:
            _stop(f"serving needs more packages: pip install 'sync_jax[serve]' ({error})", 2)
        token = os.environ.get("SYNC_JAX_TOKEN", "")
        serve(classifier, host=_HOST.value, port=_PORT.value, token=token)
    elif mode == "export":
        from sync_jax.predictor import check_artifact

        if not _OUTPUT.value:
            _stop("--mode=export needs --output, a folder", 2)
        classifier.export(_OUTPUT.value)
        say(check_artifact(_WORKDIR.value, _OUTPUT.value))


def _classifier(folder: str) -> Any:
    """The classifier of a folder, with the threshold that the options ask for."""
    from sync_jax.predictor import SelectiveClassifier

    classifier = SelectiveClassifier.load(folder)
    asked = {"coverage": _COVERAGE.value, "risk": _RISK.value}
    try:
        if _COST.value:
            error, look = map(float, _COST.value)
            asked["cost"] = error, look  # type: ignore[assignment]
        if any(x is not None for x in asked.values()):
            classifier = classifier.with_threshold(delta=_DELTA.value, **asked)  # type: ignore[arg-type]
    except ValueError as error:
        _stop(f"no threshold can be chosen: {error}", 2)
    return classifier


def _predict(classifier: Any) -> None:
    """Predicts all pictures of --input into --output."""
    from sync_jax.deploy.stream import counter, stream
    from sync_jax.runtime.console import say

    if not _INPUT.value or not _OUTPUT.value:
        _stop("--mode=predict needs --input and --output", 2)
    with counter() as progress:
        done = stream(classifier, Path(_INPUT.value), Path(_OUTPUT.value), progress=progress)
    if done.resumed:
        say(f"went on after {done.resumed:,} rows that were there")
    for line in done.examples[:5]:
        say(line)
    share = 100 * done.accepted / max(done.rows, 1)
    unreadable = f", {done.unreadable:,} unreadable" if done.unreadable else ""
    say(
        f"{done.rows:,} pictures: {done.accepted:,} answered ({share:.1f} %), "
        f"{done.rows - done.accepted - done.unreadable:,} abstained{unreadable}; {_OUTPUT.value}"
    )


def _check_options(mode: str) -> None:
    """Refuses an option that belongs to another mode."""
    if _RUNS.value or _MIXED.value or _SCORES.value:
        _stop("--runs, --mixed and --scores belong to --mode=compare and --mode=ensemble", 2)
    if _VARY.value and mode not in ("sweep", "check"):
        _stop("--vary belongs to --mode=sweep", 2)
    config = flags.FLAGS["config"]
    file = config_flags.get_config_filename(config) if config.present else ""
    # The config of a folder that others may have written could name data that import modules.
    if file.startswith(f"{RUN}:") and mode != "evaluate":
        _stop(f"--config={file} belongs to --mode=evaluate", 2)
    if _REMOVE.value and mode != "clean":
        _stop("--remove belongs to --mode=clean", 2)


def _do_together(mode: str, config: ConfigDict) -> None:
    """Does what all processes do, once they have met."""
    from sync_jax import train, trainer
    from sync_jax.data import loading, registry
    from sync_jax.runtime import compilation_cache, sharding
    from sync_jax.runtime.console import say

    file = config_flags.get_config_filename(flags.FLAGS["config"])
    name = Path(file.partition(":")[0]).stem
    workdir = Path(_WORKDIR.value or f"runs/{name}-{config.method}-seed{config.seed}")
    sharding.check_devices()
    for line in (
        trainer.choose_network(config, workdir) if mode in ("train", "labels", "evaluate") else ()
    ):
        say(line)
    if mode in ("train", "sweep", "labels") and (
        complaint := compilation_cache.use(config.process.compilation_cache)
    ):
        print(printable(complaint))
    if mode == "prepare":
        loading.prepare(config, registry.dataset(config.data))
    elif mode == "train":
        train.train_and_evaluate(config, workdir)
    elif mode == "evaluate":
        train.evaluate(config, workdir)
    else:
        from sync_jax import sweep

        if mode == "labels":
            out = Path(_WORKDIR.value or f"runs/{name}-labels")
            sweep.label_errors(config, out, folds=_FOLDS.value)
        elif not sweep.sweep(config, _VARY.value, Path(_WORKDIR.value or "runs"), name=name):
            _stop("some runs diverged", 1)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line, and ends the program with one line where that fails."""
    given = [x for x in arguments if re.match("--?config(=|$)", x)]
    if len(given) > 1:
        _stop(f"--config is given {len(given)} times ({' '.join(given)}); name one", 2)
    if not given and "clean" in _values(arguments, "mode"):
        arguments = [arguments[0], "--config=quickstart", *arguments[1:]]  # for data.data_dir
    if not given and _values(arguments, "predictions"):
        if any(re.match(r"--?config\.", x) for x in arguments):
            arguments = [arguments[0], "--config=quickstart", *arguments[1:]]
    elif not given and "evaluate" in _values(arguments, "mode"):
        for workdir in _values(arguments, "workdir")[-1:]:
            arguments = [arguments[0], f"--config={RUN}:{workdir}", *arguments[1:]]
    try:
        rest = flags.FLAGS(arguments)
    except SystemExit:  # absl has printed the help
        sys.exit(0)
    except Exception as error:  # config_flags raises what it likes
        _stop(_explain(arguments, error), 2)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # at the default level Orbax and TFDS narrate
    return rest


def _explain(arguments: list[str], error: Exception) -> object:
    """Returns what is wrong with an option, or with an override of the config."""
    from sync_jax.config import FIELDS, unknown_field
    from sync_jax.errors import InputError

    if isinstance(error, flags.Error | InputError):
        return error
    for argument in arguments:
        path = argument.partition("=")[0].lstrip("-")
        field = path.removeprefix("config.")
        if field != path and field not in FIELDS and not field.startswith(("model.", "loss.")):
            return unknown_field(field)
    return f"an option cannot be used: {type(error).__name__}: {error}"


def _values(arguments: list[str], name: str) -> list[str]:
    """The values of an option, in either spelling; flags.FLAGS does not know them yet."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and option == name:
            found.append(value if equals else following)
    return found


def _stop(message: object, status: int) -> NoReturn:
    """Ends the program with one line; with --verbosity=1 after the traceback."""
    if sys.exc_info()[0] is not None and logging.get_verbosity() >= logging.DEBUG:
        traceback.print_exc()
    print(f"sync_jax: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    keep_freed_memory()  # here and not in main: tests call that, long after JAX has begun
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # or tables could not be printed as ASCII
            stream.reconfigure(errors="backslashreplace")
    with ending_at_ctrl_c():
        app.run(main, flags_parser=parse_flags)
