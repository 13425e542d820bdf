"""Trains, calibrates and evaluates a selective classifier, and writes its report.

  python -m sync_jax.main --config=fashion_mnist
  python -m sync_jax.main --config=fashion_mnist --config.method=ce --config.seed=1
  python -m sync_jax.main --mode=compare --runs='runs/fashion_mnist-*'

A run that was stopped goes on with the same command. Exit status: 0 done, 1 training failed, 2 bad
config or input (nothing is written), 75 stopped by SIGTERM with its state saved, 130 interrupted.
"""

import io
import itertools
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from sync_jax.runtime.console import printable
from sync_jax.runtime.memory import keep_freed_memory

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "An installed config, such as quickstart, or a Python file with get_config(); --config.x.y=z "
    "changes a field.",
    # Methods and backbones declare fields of their own, which config.validate checks.
    lock_config=False,
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run. Default: runs/<config>-<method>-seed<seed>; of a sweep, which makes such "
    "folders in it, runs.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["prepare", "train", "evaluate", "sweep", "compare", "ensemble", "methods", "clean"],
    "prepare: obtain and convert the dataset. train: prepare, train or resume, calibrate, evaluate "
    "and report. evaluate: make the report of the finished run in --workdir anew, with other "
    "--config.evaluation.* values; it needs no --config. "
    "sweep: train every combination of the --vary values. compare: "
    "one table of the --runs. ensemble: evaluate the mean of their probabilities. methods: list "
    "methods, scores and backbones with their options. clean: list what --config.data.data_dir "
    "holds, or remove what --remove names.",
)
_REMOVE = flags.DEFINE_list(
    "remove", [], "clean: prepared data sets and downloads to remove, as --mode=clean lists them."
)
_RUNS = flags.DEFINE_list(
    "runs", [], "compare, ensemble: folders of finished runs, or patterns such as 'runs/x-*'."
)
_VARY = flags.DEFINE_multi_string(
    "vary", [], "sweep: a field and its values, such as seed=0,1,2; may be given repeatedly."
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
    except OSError as error:  # what no one expected: a disk that is full, a folder that vanished
        where = error.filename or f"a file of --workdir={_WORKDIR.value or 'runs'}"
        _stop(f"{where} cannot be used: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from what was saved", 130)
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
    if mode == "methods":
        from sync_jax import listing

        print(listing.describe())
        return
    from sync_jax.config import check_path, default_config, validate

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
    if _RUNS.value or _MIXED.value or _SCORES.value:
        _stop("--runs, --mixed and --scores belong to --mode=compare and --mode=ensemble", 2)
    if _VARY.value and mode != "sweep":
        _stop("--vary belongs to --mode=sweep", 2)
    if _REMOVE.value and mode != "clean":
        _stop("--remove belongs to --mode=clean", 2)
    config = _CONFIG.value
    if mode == "clean" and not flags.FLAGS["config"].present:
        config = default_config()
    elif not flags.FLAGS["config"].present:
        _stop("--config is missing; for example --config=quickstart", 2)
    if not isinstance(config, ConfigDict):  # what config_flags hands out when it cannot read a file
        _stop(_explain(sys.argv, TypeError("get_config() must return a ConfigDict")), 2)
    if mode == "clean":
        from sync_jax.data.prepare import cache

        validate(config)
        cache.clean(config.data.data_dir, _REMOVE.value)
        return
    from sync_jax import trainer
    from sync_jax.runtime import processes
    from sync_jax.runtime.console import say
    from sync_jax.runtime.signals import ending_at_sigterm

    left_out = trainer.resolve(config)
    processes.initialize(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, seconds=config.process.wait_seconds
    )
    for line in left_out:
        say(line)
    with ending_at_sigterm(processes.outlast_others):
        _do_together(mode, config)


def _do_together(mode: str, config: ConfigDict) -> None:
    """Does what all processes do, once they have met."""
    from sync_jax import train
    from sync_jax.data import loading, registry
    from sync_jax.runtime import compilation_cache, sharding

    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(_WORKDIR.value or f"runs/{name}-{config.method}-seed{config.seed}")
    sharding.check_devices()
    if mode in ("train", "sweep") and (
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

        if not sweep.sweep(config, _VARY.value, Path(_WORKDIR.value or "runs"), name=name):
            _stop("some runs diverged", 1)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line, and ends the program with one line where that fails."""
    arguments = _with_run_config(_with_config_paths(arguments))
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        # config_flags puts a whole traceback into some messages; its last line says it all.
        message = str(error)
        if "Traceback" in message:
            message = f"--config={_config_file(arguments)}: {message.splitlines()[-1]}"
        _stop(message, 2)
    except (Exception, SystemExit) as error:  # config_flags raises what it likes, a file anything
        if isinstance(error, SystemExit) and {"--help", "--helpshort", "--helpfull"} & {*arguments}:
            sys.exit(0)  # absl has printed the help
        _stop(_explain(arguments, error), 2)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # at the default level Orbax and TFDS narrate
    return rest


def _explain(arguments: list[str], error: BaseException) -> str:
    """What is wrong with --config or one of its overrides."""
    from sync_jax.config import FIELDS, unknown_field
    from sync_jax.errors import InputError, suggestion

    if isinstance(error, InputError):
        return str(error)
    file = _config_file(arguments)
    if not Path(file.partition(":")[0]).is_file():
        known = _installed_configs()
        return (
            f"--config={file} is no file and no known config"
            f"{suggestion(Path(file).stem, known)}; choose from {', '.join(known)}, or name a file"
        )
    for argument in arguments:
        path = argument.partition("=")[0].lstrip("-")
        field = path.removeprefix("config.")
        if field != path and field not in FIELDS and not field.startswith(("model.", "loss.")):
            return unknown_field(field)
    return f"--config={file} cannot be used: {type(error).__name__}: {error}"


def _installed_configs() -> dict[str, Path]:
    """Returns the configs that come with sync_jax, by name: in the package or in its checkout."""
    package = Path(__file__).parent
    folder = package / "configs"  # of a wheel; setup.py puts it there
    if not folder.is_dir():
        folder = package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def _with_config_paths(arguments: list[str]) -> list[str]:
    """Replaces the name of an installed config by its path, as in --config=quickstart."""
    known = _installed_configs()

    def found(value: str) -> str:
        name, colon, rest = value.partition(":")
        return value if name not in known or Path(name).is_file() else f"{known[name]}{colon}{rest}"

    replaced = arguments[:1]
    for before, argument in itertools.pairwise(arguments):
        option, equals, value = argument.partition("=")
        if before in ("-config", "--config"):
            argument = found(argument)
        elif equals and option in ("-config", "--config"):
            argument = f"{option}={found(value)}"
        replaced.append(argument)
    return replaced


def _with_run_config(arguments: list[str]) -> list[str]:
    """Adds the run's own config to --mode=evaluate of a --workdir without a --config."""
    mode, workdir = (_config_file(arguments, option) for option in ("mode", "workdir"))
    if mode != "evaluate" or not workdir or _config_file(arguments):
        return arguments
    own = Path(__file__).with_name("config.py")
    return [arguments[0], f"--config={own}:{workdir}", *arguments[1:]]


def _config_file(arguments: list[str], name: str = "config") -> str:
    """The value of --config, in either spelling; flags.FLAGS does not know it while it parses."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and option == name:
            return value if equals else following
    return ""


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
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:  # before main's own
        _stop("interrupted", 130)
