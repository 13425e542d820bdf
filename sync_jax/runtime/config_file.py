"""Config files: found by name or path, and run for the config that they return."""

import runpy
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sync_jax.errors import InputError, suggestion

RUN = "run"  # with the folder of a run as its argument: the run's own config


class ConfigFile(flags.ArgumentParser):
    """Parses --config: NAME of an installed config or FILE, as in NAME:ARGUMENT, or run:FOLDER.

    config_flags' own parser logs warnings, loses lines and hides errors of files; this one raises
    an InputError.
    """

    def parse(self, argument: str) -> ConfigDict:
        """Returns the result of the file's get_config()."""
        name, *rest = argument.split(":", 1)
        if name == RUN and rest:
            from sync_jax.config import config_of_run  # here, for --helpshort need not wait for it

            return config_of_run(*rest)
        known = installed_configs()
        file = str(known[name] if name in known and not Path(name).is_file() else Path(name))
        if not Path(file).is_file():
            raise InputError(
                f"--config={argument} is no file and no known config"
                f"{suggestion(Path(name).stem, known)}; choose from {', '.join(known)}, or name a "
                "file"
            )
        try:
            module = runpy.run_path(file)
            if "get_config" not in module:
                raise InputError("it has no get_config()")
            config = module["get_config"](*rest)
        except (Exception, SystemExit) as error:
            raise InputError(f"--config={argument}: {_described(error, file)}") from error
        if not isinstance(config, ConfigDict):
            raise InputError(
                f"--config={argument}: get_config() returned {config!r}; it must return a "
                "ConfigDict"
            )
        return config


def installed_configs() -> dict[str, Path]:
    """Returns the configs that come with sync_jax, by name: in the package or in its checkout."""
    package = Path(__file__).parents[1]
    folder = package / "configs"  # of a wheel; setup.py puts it there
    if not folder.is_dir():
        folder = package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def _described(error: BaseException, file: str) -> str:
    """An error with the line of the file, and that of the other file in which it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    message = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    if not lines:  # raised here, or of a file that is no Python, whose line the message says
        return message
    raised = frames[-1]
    where = "" if raised.filename == file else f" ({raised.filename}, line {raised.lineno})"
    return f"line {lines[-1]}: {message}{where}"
