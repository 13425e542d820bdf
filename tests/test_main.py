import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from absl.testing import flagsaver

from sync_jax import errors, main, train
from tests import tiny

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with nothing but configs/."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    """Does what the command line does, in this process; returns the exit status."""
    command = ["main.py", *arguments]
    sys.modules.pop("config_config", None)  # or config_flags would load the next file into it
    with flagsaver.flagsaver(), mock.patch.object(sys, "argv", command):
        flags.FLAGS.unparse_flags()
        try:
            main.main(main.parse_flags(command))
        except SystemExit as stop:
            return int(str(stop.code))
        return 0


def config_file(text: str) -> str:
    Path("mine.py").write_text(text)
    return "--config=mine.py"


BAD = {
    "no config": ([], "--config is missing; for example --config=configs/fashion_mnist.py"),
    "no such file": (
        ["--config=configs/imagnet.py"],
        "configs/imagnet.py is no file; choose from configs/cifar10.py, .*, or name one of yours",
    ),
    "a folder": (["--config=configs"], "--config=configs is no file"),
    "stray argument": ([QUICKSTART, "train"], "unexpected argument 'train'"),
    "unknown flag": ([QUICKSTART, "--workdri=x"], "Unknown command line flag 'workdri'"),
    "unknown mode": (
        [QUICKSTART, "--mode=tset"],
        "--mode=tset: .*prepare.train.evaluate.sweep.compare.ensemble",
    ),
    "unknown field": (
        [QUICKSTART, "--config.train.epocs=3"],
        "config.train has no field 'epocs' .did you mean 'epochs'..; choose from batch_size",
    ),
    "unknown section": ([QUICKSTART, "--config.trian.epochs=3"], "did you mean 'train'"),
    "field of a value": ([QUICKSTART, "--config.method.x=3"], "config.method is a value"),
    "value for a section": ([QUICKSTART, "--config.train=3"], "config.train=3"),
    "no number": ([QUICKSTART, "--config.train.epochs=many"], "config.train.epochs=many"),
    "no integer": ([QUICKSTART, "--config.train.batch_size=1.5"], "config.train.batch_size=1.5"),
    "no boolean": ([QUICKSTART, "--config.data.flip=maybe"], "config.data.flip=maybe"),
    "unknown method": (
        [QUICKSTART, "--config.method=snyc"],
        "config.method='snyc' .*did you mean 'sync'.*choose from ccl_sc, ce, deep_gamblers, ",
    ),
    "unknown dataset": (
        [QUICKSTART, "--config.data.name=mnist"],
        "config.data.name='mnist' is unknown.*choose from cifar10, .*fashion_mnist, ",
    ),
    "no data": (
        [f"--config={ROOT}/configs/imagenet100.py", "--config.data.data_dir=data"],
        "imagenet100 is not prepared: .*ILSVRC2012_img_train.tar.*image-net.org.*--mode=prepare",
    ),
    "no such source": (
        [
            f"--config={ROOT}/configs/stanford_cars.py",
            "--mode=prepare",
            "--config.data.data_dir=data",
            "--config.data.source=nowhere",
        ],
        "data.source='nowhere' does not exist; it must hold cars_train/",
    ),
    "crops beyond the square": (
        [QUICKSTART, "--config.data.stored_size=32"],
        "image_size=64, stored_size=32 and short_side=32 must not decrease",
    ),
    "not finite": ([QUICKSTART, "--config.loss.alpha=nan"], r"alpha=nan must be .* in \[0, 1\]"),
    "coverage 0": ([QUICKSTART, "--config.target_coverage=0"], r"target_coverage=0.* \(0, 1\]"),
    "delta 1": ([QUICKSTART, "--config.evaluation.delta=1"], r"delta=1.* in \(0, 1\)"),
    "no coverages": ([QUICKSTART, "--config.evaluation.coverages=()"], r"coverages=\(\)"),
    "coverage 101": ([QUICKSTART, "--config.evaluation.coverages=(101,)"], r"in \(0, 100\]"),
    "negative seed": ([QUICKSTART, "--config.seed=-1"], "config.seed=-1 must be between 0"),
    "batch too large": (
        [QUICKSTART, "--config.train.batch_size=60000"],
        "train.batch_size=60000 is more than the 54000 training examples",
    ),
    "nothing to train on": (
        [QUICKSTART, "--config.data.calibration_size=60000"],
        "calibration_size=60000: fashion_mnist has 60000 .* use 10 to 59990",
    ),
    "endless warm-up": ([QUICKSTART, "--config.train.epochs=0.5"], "warmup_epochs=1 must be less"),
    "named folder is missing": (
        [QUICKSTART, "--config.data.source=nowhere", "--config.data.data_dir=data"],
        "data.source='nowhere'",
    ),
    "workdir is a file": ([QUICKSTART, "--workdir=configs/quickstart.py"], "is not a folder"),
    "workdir in a bucket": (
        [QUICKSTART, "--workdir=gs://bucket/run"],
        "--workdir=gs://bucket/run must be a path: .*mount the bucket, .*launch/README.md",
    ),
    "comparison in a bucket": (
        ["--mode=compare", "--runs=x", "--workdir=gs://bucket/run"],
        "--workdir=gs://bucket/run must be a path",
    ),
    "nothing to compare": (["--mode=compare"], "--runs is missing"),
    "an ensemble of nothing": (["--mode=ensemble"], "--runs is missing"),
    "no runs": (["--mode=compare", "--runs=runs/x-*"], "--runs=runs/x-. matches no folder"),
    "nothing to vary": ([QUICKSTART, "--mode=sweep"], "--vary is missing"),
    "vary what": (
        [QUICKSTART, "--mode=sweep", "--vary=metod=ce"],
        "no field 'metod' .did you mean 'method'",
    ),
    "vary to what": ([QUICKSTART, "--mode=sweep", "--vary=seed="], "needs values"),
    "vary to another type": (
        [QUICKSTART, "--mode=sweep", "--vary=seed=0,x"],
        "'x' must be of type",
    ),
    "vary twice": ([QUICKSTART, "--mode=sweep", "--vary=seed=0", "--vary=seed=1"], "varied twice"),
    "vary to the same": ([QUICKSTART, "--mode=sweep", "--vary=seed=1,1"], "names a value twice"),
    "vary to what is refused": (
        [QUICKSTART, "--mode=sweep", "--vary=method=ce,sinc"],
        "config.method='sinc' is unknown",
    ),
    "vary without sweep": ([QUICKSTART, "--vary=seed=0,1"], "--vary belongs to --mode=sweep"),
    "runs without comparison": ([QUICKSTART, "--runs=x"], "--runs and --mixed belong to"),
    "nothing to evaluate": (
        [QUICKSTART, "--mode=evaluate"],
        "runs/quickstart-sync-seed0/predictions_calibration.npz is missing",
    ),
}


for field in ("data.data_dir", "data.source", "data.folder", "model.pretrained"):
    BAD[f"{field} in a bucket"] = (
        [QUICKSTART, f"--config.{field}=gs://bucket/x"],
        f"config.{field}=gs://bucket/x must be a path: .*mount the bucket",
    )


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_exit_2_and_writes_nothing(name, capsys, folder):
    arguments, message = BAD[name]
    before = sorted(folder.rglob("*"))
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"sync_jax: .+\n", output.err), output.err
    assert re.search(message, output.err), output.err
    assert sorted(folder.rglob("*")) == before


BAD_FILES = {
    "syntax": ("def get_config(:\n", "mine.py.*SyntaxError"),
    "no function": ("x = 1\n", "mine.py.*get_config"),
    "not a config": ("def get_config():\n  return 3\n", "mine.py.*must return a ConfigDict"),
    "missing import": ("import nosuchmodule\n", "mine.py.*No module named 'nosuchmodule'"),
    "misspelt field": (
        "from sync_jax.config import default_config\n"
        "def get_config():\n  c = default_config()\n  c.loss.alhpa = 1.0\n  return c\n",
        "config.loss has no field 'alhpa' .did you mean 'alpha'",
    ),
    "wrong type": (
        "from sync_jax.config import default_config\n"
        "def get_config():\n  c = default_config()\n  c.seed = 'one'\n  return c\n",
        "mine.py.*'seed'.*one",
    ),
    "missing fields": (
        "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n",
        "is missing; begin with sync_jax.config.default_config",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_config_file_gets_one_line(name, capsys):
    text, message = BAD_FILES[name]
    assert run(config_file(text)) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"sync_jax: .+\n", output.err), output.err
    assert re.search(message, output.err), output.err


@pytest.mark.slow
def test_default_workdir_exit_statuses_and_traceback_on_demand(folder):
    """Real processes: a run with the default folder, the same again, and an error's traceback."""
    data_dir = tiny.prepare(folder)
    command = tiny.command(data_dir, folder, "--config.train.epochs=1", "--config.seed=3")
    command = [x for x in command if not x.startswith("--workdir")]

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    first = start()
    assert (first.returncode, first.stderr) == (0, "")
    workdir = Path("runs/quickstart-sync-seed3")
    for name in ("config.json", "metrics.jsonl", "report.json", "risk_coverage.png"):
        assert (folder / workdir / name).stat().st_size > 0
    assert re.search(
        r"step 8/12 .*loss .*accuracy .*mean g .*coverage .*images/s .*s left", first.stdout
    )
    assert re.search(r"epoch 1\.0 .*calibration accuracy .*mean g", first.stdout)

    again = start()
    assert (again.returncode, again.stderr) == (0, "")
    assert "holds a finished run" in again.stdout

    quiet, loud = start("--config.method=x"), start("--config.method=x", "--verbosity=1")
    assert quiet.returncode == loud.returncode == 2
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.TerminatedError("saved at step 3"), 75, "saved at step 3; the same command"),
        (errors.WriteError("x cannot be written"), 1, "x cannot be written"),
        (OSError(28, "No space left on device", "f"), 1, "f cannot be used: No space left on dev"),
        (train.NonFiniteError("step 3: loss=nan"), 1, "training stopped at step 3: loss=nan"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
)
def test_exit_statuses(error, status, line, monkeypatch, capsys):
    def fails(config, workdir):
        raise error

    monkeypatch.setattr(train, "train_and_evaluate", fails)
    assert run(QUICKSTART) == status
    assert capsys.readouterr().err.startswith(f"sync_jax: {line}")


def test_help_names_the_flags_the_modes_and_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "sync_jax.main", "--helpshort"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    shown = result.stdout + result.stderr
    assert "python -m sync_jax.main --config=configs/fashion_mnist.py" in shown
    for word in ("--config", "--workdir", "--mode", "prepare", "evaluate", "Exit status"):
        assert word in shown
