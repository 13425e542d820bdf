import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sync_jax import errors, main, options, train
from sync_jax.config import to_json
from sync_jax.data import registry
from sync_jax.evaluation.report import read_report
from sync_jax.runtime import processes, sharding
from sync_jax.runtime.workdir import prepare_workdir
from tests import tiny
from tests.command_line import QUICKSTART, ROOT, run
from tests.test_bad_input import finished_run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with nothing but configs/."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_with_the_default_folder(folder, monkeypatch, capsys):
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    command = tiny.command(tiny.prepare(folder), folder, "--config.seed=3")[3:]
    assert run(*[x for x in command if not x.startswith("--workdir")]) == 0
    for name in ("config.json", "metrics.jsonl", "report.json", "risk_coverage.png"):
        assert (folder / "runs" / "quickstart-sync-seed3" / name).stat().st_size > 0
    shown = capsys.readouterr()
    assert re.search(r"^about \d+ seconds? of training left$", shown.out, re.MULTILINE)
    line = r"step 8/18 .*loss .*accuracy .*mean g .*coverage .*images/s .*s left"
    assert re.search(line, shown.out)
    assert re.search(r"epoch 1\.0 .*calibration accuracy .*mean g", shown.out)
    assert shown.err == ""


@pytest.mark.parametrize("loud", [False, True])
def test_a_traceback_is_shown_on_demand(loud, capfd):
    assert run(QUICKSTART, "--config.method=x", *["--verbosity=1"] * loud) == 2
    assert ("Traceback" in capfd.readouterr().err) == loud


@pytest.mark.slow
def test_on_a_read_only_disk_nothing_is_begun_anew_and_nothing_lost(folder):
    """Where there are checkpoints, and no report yet."""
    workdir = folder / "run"
    prepare_workdir(tiny.config(tiny.prepare(folder)), workdir)
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    read_only = (
        f'mount --bind "{workdir}" "{workdir}" && mount -o remount,ro,bind "{workdir}" && '
        'exec "$0" "$@"'
    )
    inside = ["unshare", "--mount", "sh", "-c", read_only]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    refused = subprocess.run(
        [*inside, *tiny.command(folder / "data", workdir)], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr == (
        f"sync_jax: --workdir={workdir} cannot be written: Read-only file system\n"
    )
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_evaluate_takes_the_runs_own_config_and_no_data(folder, monkeypatch, capsys):
    """Nor are they needed to compare runs, or to combine them."""
    runs = [folder / "one", folder / "two"]
    for seed, path in enumerate(runs):
        finished_run(tiny.config(folder / "moved", seed=seed, method="ce"), path)
    monkeypatch.setattr(registry, "dataset", None)
    monkeypatch.setenv("HOME", "")
    evaluate = ["--mode=evaluate", f"--workdir={runs[0]}"]
    assert run(*evaluate, "--config.evaluation.delta=0.2") == 0
    assert "own config" not in capsys.readouterr().out
    report = read_report(runs[0])
    assert report["config"]["evaluation"].pop("delta") == 0.2
    assert (
        report["config"]["evaluation"].items()
        < read_report(runs[1])["config"]["evaluation"].items()
    )
    assert report["config"]["method"] == "ce"
    # A config that is given says what to evaluate, and not of what.
    assert run(*evaluate, QUICKSTART, "--config.train.epochs=9") == 0
    assert "config.method is 'ce' there and 'sync' here" in capsys.readouterr().out
    found = read_report(runs[0])["config"]
    assert (found["train"]["epochs"], found["evaluation"]["delta"]) == (1.5, 0.05)
    for mode in ("compare", "ensemble"):
        names = f"--runs={runs[0]},{runs[1]}"
        assert run(f"--mode={mode}", names, f"--workdir={folder / mode}") == 0


@pytest.mark.parametrize("field", ["method", "model.name", "evaluation.scores"])
def test_evaluate_imports_no_module_that_a_run_names(field, folder, monkeypatch, capsys):
    monkeypatch.setattr(options, "importlib", None)  # what options.find calls
    config = tiny.config(folder)
    finished_run(config, folder / "run")
    name = ("os:X",) if field == "evaluation.scores" else "os:X"
    config.update_from_flattened_dict({field: name})
    (folder / "run" / "config.json").write_text(to_json(config))
    evaluate = ["--mode=evaluate", f"--workdir={folder / 'run'}"]
    assert run(*evaluate) == 2
    shown = capsys.readouterr().err
    assert "names modules, which are imported only if you name them: give --config and " in shown
    assert f"--config.{field}=os:X" in shown
    assert run(*evaluate, QUICKSTART) == (2 if field == "method" else 0)
    assert run(*evaluate, QUICKSTART, "--config.data.folder=pictures") == 2


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.TerminatedError("saved at step 3"), 75, "saved at step 3; the same command"),
        (errors.WriteError("x cannot be written"), 1, "x cannot be written"),
        (OSError(28, "No space left on device", "f"), 1, "f cannot be used: No space left on dev"),
        (errors.NonFiniteError("step 3: loss=nan"), 1, "training stopped at step 3: loss=nan"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "a device's memory is full (RESOU"),
    ],
)
def test_exit_statuses(error, status, line, monkeypatch, capsys):
    def fails(config, workdir):
        raise error

    monkeypatch.setattr(train, "train_and_evaluate", fails)
    assert run(QUICKSTART) == status
    assert capsys.readouterr().err.startswith(f"sync_jax: {line}")


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_auto_is_replaced_when_the_processes_have_met(mode, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(processes, "initialize", lambda *given, **more: done.append("met"))
    monkeypatch.setattr(jax, "default_backend", lambda: done.append("looked") or "cpu")
    name = "train_and_evaluate" if mode == "train" else "evaluate_finished"
    monkeypatch.setattr(train, name, lambda config, workdir: done.append(config.model.to_dict()))
    assert run("--config=image_folder", "--config.model.width=8", f"--mode={mode}") == 0
    assert done[:2] == ["met", "looked"]
    assert (done[-1]["name"], done[-1]["width"]) == ("cnn", 8)
    assert "config.model.name=auto: cnn, without an accelerator\n" in capsys.readouterr().out


def test_check_looks_at_options_and_config_and_at_nothing_else(folder, monkeypatch, capsys):
    def touched(*arguments, **options):
        raise AssertionError("a device, a process or data")

    for owner, name in [
        *((jax, x) for x in ("devices", "local_devices", "default_backend", "process_index")),
        *((processes, "initialize"), (registry, "dataset"), (sharding, "make_mesh")),
    ]:
        monkeypatch.setattr(owner, name, touched)
    good = ["--config=image_folder", "--config.data.folder=nowhere", "--config.model.width=8"]
    vary = ["--mode=sweep", "--vary=seed=0,1", "--vary=method=ce,sync"]
    assert run(*good, "--mode=check") == run(*good, *vary, "--mode=check") == 0
    assert capsys.readouterr().out == 2 * "the options and the config are good\n"
    for bad, message in {
        "--config.train.epoch=3": "config.train.epoch is no field (did you mean 'train.epochs'?)",
        "--config.model.widht=8": "has no option 'widht' (did you mean 'width'?)",
        "--vary=loss.alpha=2.0": "config.loss.alpha=2.0 must be",
        "--workdir=gs://bucket/run": "--workdir=gs://bucket/run must be a path",
    }.items():
        assert run(*good, bad, "--mode=check") == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["configs"]


def test_help_names_the_flags_the_modes_and_the_command():
    command = [sys.executable, "-m", "sync_jax.main", "--helpshort"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    shown = result.stdout + result.stderr
    assert result.returncode == 0
    assert "sync_jax: " not in shown  # how an error's line begins
    for word in ("--config", "--workdir", "--mode", "prepare", "evaluate", "Exit status"):
        assert word in shown


def test_without_arguments_the_commands_are_shown_and_jax_is_not_imported(
    folder, capsys, monkeypatch
):
    code = (
        "import sys; from tests.command_line import run\n"
        "assert run() == run('--mode=help') == 0 and 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    lines, again = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert lines == again
    assert max(map(len, lines)) <= 80
    start = "  python -m sync_jax.main "
    commands = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert len(commands) == 7
    done = []
    monkeypatch.setattr(main, "_do", lambda: done.append(1))
    prepare_workdir(tiny.config(folder), folder / "runs" / "quickstart-sync-seed0")
    for line in commands:  # the flags exist, and so do the configs
        assert run(*shlex.split(line)) == 0, line
    assert len(done) == 7
    assert capsys.readouterr().err == ""
