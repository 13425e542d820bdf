"""The wheel holds the whole package, and --config=NAME works from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sync_jax import __version__
from tests.command_line import ROOT, run

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the unpacked wheel."""
    source, wheels, unpacked = (tmp_path_factory.mktemp(x) for x in ("source", "wheels", "site"))
    # A copy, because setuptools writes build/ and *.egg-info beside what it builds.
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sync_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    # The build backend itself, because pip would fetch setuptools anew.
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(wheels)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked


def test_the_wheel_holds_every_module_config_data_file_and_the_license(installed):
    def held(folder: Path) -> set[str]:
        paths = (path for path in folder.rglob("*") if path.suffix in (".py", ".txt"))
        return {path.relative_to(folder).as_posix() for path in paths}

    in_checkout = {
        *(f"sync_jax/{name}" for name in held(ROOT / "sync_jax")),
        *(f"sync_jax/configs/{name}" for name in held(ROOT / "configs")),
    }
    in_wheel = {f"sync_jax/{name}" for name in held(installed / "sync_jax")}
    assert in_wheel == in_checkout
    assert any(name.endswith("imagenet100.txt") for name in in_wheel)
    assert {x.name for x in installed.iterdir()} == {
        "sync_jax",
        f"sync_jax-{__version__}.dist-info",
    }
    (license_file,) = installed.glob("*.dist-info/**/LICENSE")
    assert license_file.read_text() == (ROOT / "LICENSE").read_text()
    assert "Apache License" in license_file.read_text()


# The command line twice in one process, because importing takes most of the time.
COMMANDS = """
import sys
from absl import flags
from sync_jax import main

for name in sys.argv[1:]:
    flags.FLAGS.unparse_flags()
    sys.argv = ["main.py", f"--config={name}", "--mode=evaluate"]
    try:
        main.main(main.parse_flags(sys.argv))
    except SystemExit as stop:
        print(stop.code)
"""


def test_an_installed_config_is_found_by_its_name_from_any_folder(installed, tmp_path):
    """The error of each command tells that its config was read and what the run is called."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, "quickstart", "cifar100"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "2"], done.stderr
    for name in ("quickstart", "cifar100"):
        assert f"runs/{name}-sync-seed0/predictions_calibration.npz is missing" in done.stderr


def test_every_config_of_the_checkout_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    """Without configs/ in the current folder, as in an editable installation."""
    monkeypatch.chdir(tmp_path)
    assert len(CONFIGS) > 5
    for name in CONFIGS:
        assert run(f"--config={name}", "--config.method=x") == 2
        assert "config.method='x' is unknown" in capsys.readouterr().err, name


def test_only_the_value_of_config_is_looked_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("--config", "quickstart", "--mode=evaluate", "--workdir", "cifar10")
    assert run(*arguments) == 2
    assert "sync_jax: cifar10/predictions_calibration.npz is missing" in capsys.readouterr().err


def test_a_file_of_that_name_takes_precedence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("def get_config():\n    return 3\n")
    assert run("--config=quickstart") == 2
    assert "--config=quickstart: get_config() returned 3" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", [["--config=qickstart"], ["--config", "qickstart"]])
def test_an_unknown_name_is_refused_with_the_known_ones(spelling, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*spelling) == 2
    error = capsys.readouterr().err
    assert "--config=qickstart is no file" in error
    assert "did you mean 'quickstart'" in error
    assert all(name in error for name in CONFIGS)


@pytest.mark.parametrize("name", ["__init__", "", "../configs/quickstart", "quickstart.py"])
def test_nothing_else_is_looked_up(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(f"--config={name}") == 2
    assert f"--config={name} is no file" in capsys.readouterr().err
