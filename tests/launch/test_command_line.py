"""The output of launch/: dry runs, bad usage, and what other programs make of it."""

import concurrent.futures
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.cloud import CONFIG, REPOSITORY, TPU, WHERE, WORKDIR, Cloud

LAUNCH = REPOSITORY / "launch"
VERBS = ("create", "setup", "run", "status", "logs", "stop", "delete")
MORE = ["--type=v5litepod-16", "--spot", WORKDIR, CONFIG, "--env=FAKE_ROOT"]


def test_a_dry_run_prints_every_command_and_calls_none(cloud: Cloud):
    """A dry run prints what is called without it, but for names of temporary files."""
    shown = {verb: cloud.tpu(verb, *MORE, "--dry-run") for verb in VERBS}
    assert not cloud.calls()
    assert shown["create"].endswith(f"  {TPU} delete {' '.join(WHERE)}\n")
    cloud.trainer("exit 0")
    for verb in VERBS:
        before = len(cloud.calls())
        cloud.tpu(verb, *MORE, "--yes")
        commands = [shlex.split(x) for x in shown[verb].splitlines() if x.startswith("gcloud ")]
        if verb == "delete":  # what it does depends on what the first answers
            commands.pop()
        called = [
            ["gcloud", *(re.sub(r"^/tmp/tmp\.\w+/", "", word) for word in call)]
            for call in cloud.calls()[before:]
        ]
        assert commands == called


RUN = f"run {WORKDIR} {CONFIG}"
BAD = {
    "": "--name=sync is not a verb; choose from create",
    "status --name=": "--name= is not an option",
    "create": "--type is missing",
    "create --type=v9-8": "--type=v9-8 is not known here",
    "status --naem=x": "--naem=x is not an option",
    "stop --grace=soon": "--grace=soon is not a number of seconds",
    f"run {WORKDIR}": "--config is missing; for example",
    f"run {CONFIG}": "--workdir is missing",
    f"run {CONFIG} --workdir=runs/a": "each host's own disk",
    f"run {CONFIG} --workdir=gs:///a": "gs:///a names no bucket",
    f"{RUN} -- --workdir=x": "--workdir=x belongs before the --",
    f"{RUN} -- x": "x after -- is not an option",
    f"{RUN} --env=A=b": "takes the name of a variable",
    f"{RUN} --env=NO_SUCH": "of a variable that is set here",
}


def test_bad_usage_is_one_line_and_exit_2(cloud: Cloud):
    assert "--name is missing" in cloud.start(TPU, "status").communicate()[1]
    for line, message in BAD.items():
        words = line.split()
        child = cloud.start(TPU, *words[:1], *WHERE, *words[1:])
        output, errors = child.communicate(timeout=60)
        assert (child.returncode, output) == (2, ""), errors
        assert re.fullmatch(r"launch/tpu\.sh: .+\n", errors), errors
        assert message in errors
    assert not cloud.calls()


def test_a_bad_config_is_refused_before_anything_costs_money(cloud: Cloud):
    cloud.script("bin/python3", f"exec '{sys.executable}' \"$@\"")
    words = ["--type=v4-8", WORKDIR, CONFIG, "--", "--mode=sweep", "--vary=seed=0,1"]
    refused = cloud.tpu("create", *words, "--config.train.epoch=3", status=2)
    assert re.fullmatch(r"launch/tpu.sh: sync_jax: config.train.epoch is no field.*\n", refused)
    assert "gcloud" in cloud.tpu("create", "--dry-run", *words, "--config.train.epochs=3")
    cloud.script("bin/python3", "echo a reason >&2; exit 2")
    for verb in ("create", "setup", "run"):
        assert cloud.tpu(verb, *words, status=2) == "launch/tpu.sh: a reason\n"
    options = cloud.tpu("create", "--type=v4-8", "--", "--config.train.epoch=3", status=2)
    assert "--config is missing, without which --config.train.epoch=3 is not checked" in options
    assert not cloud.calls()
    cloud.tpu("status", CONFIG, status=1)  # which asks the cloud, and no trainer


def test_without_sync_jax_here_it_says_so_and_goes_on(cloud: Cloud):
    cloud.script("bin/python3", "echo No module named absl >&2; exit 1")
    shown = cloud.tpu("create", "--type=v4-8", CONFIG, "--", "--config.train.epoch=3")
    assert "warning: the config is not checked, because sync_jax is not installed here" in shown
    assert len(cloud.calls("create")) == 1


def test_a_path_on_the_disk_of_a_spot_machine_is_warned_of(cloud: Cloud):
    def warned(*words: str) -> list[str]:
        shown = cloud.tpu("create", "--type=v4-8", "--dry-run", *words)
        return re.findall(r"warning: if (\S+) is on a host's own disk", shown)

    own, shared = "/home/me/run", f"{cloud.root}/mnt/bucket/run"
    data = "--config.data.data_dir="
    assert warned("--spot", f"--workdir={own}") == [f"--workdir={own}"]
    assert warned("--spot", CONFIG, "--", f"{data}{own}") == [f"{data}{own}"]
    assert warned(f"--workdir={own}") == []
    for path in (shared, "gs://bucket/run"):
        assert warned("--spot", f"--workdir={path}", CONFIG, "--", f"{data}{path}") == []


def test_the_help_and_the_readme_name_options_that_exist(cloud: Cloud):
    usage = cloud.tpu("help")
    for verb in VERBS:
        assert f"\n  {verb} " in usage
    known = re.findall(r"(--[a-z-]+)(?:=\?\*)?(?:\) | \| )", (REPOSITORY / TPU).read_text())
    assert len(known) > 12
    assert set(known) - {"--help"} <= set(re.findall(r"--[a-z-]+", usage))
    text = (LAUNCH / "README.md").read_text() + (REPOSITORY / "README.md").read_text()
    commands = re.findall(r"^launch/tpu\.sh .*$", text.replace("\\\n", ""), re.M)
    assert {shlex.split(command)[1] for command in commands} == set(VERBS)
    for command in set(commands):
        ours, *trainers = command.split(" -- ")
        child = cloud.start("bash", "-c", " -- ".join([f"{ours} --dry-run", *trainers]))
        output, errors = child.communicate(timeout=60)
        assert (child.returncode, errors) == (0, ""), command
        assert "gcloud compute tpus" in output
    assert not cloud.calls()


REAL_GCLOUD = shutil.which("gcloud")


@pytest.mark.slow
@pytest.mark.skipif(REAL_GCLOUD is None, reason="the real gcloud is not installed")
def test_the_real_gcloud_parses_every_command(cloud: Cloud, tmp_path: Path):
    """It rejects what it does not know before it asks for an account, and has none here."""
    lines = [x for verb in VERBS for x in cloud.tpu(verb, *MORE, "--dry-run").splitlines()]
    lines += cloud.tpu("create", "--type=v4-8", "--dry-run").splitlines()
    kinds = {tuple(line.split()[3:5]): line for line in lines if line.startswith("gcloud ")}
    assert len(kinds) == 9  # ssh, scp; create, describe and delete of both, list
    bogus = "gcloud compute tpus tpu-vm list --zone=a --project=b --bogus"
    environment = {"PATH": cloud.environment["PATH"], "HOME": str(tmp_path)}
    environment["CLOUDSDK_CONFIG"] = str(tmp_path / "config")

    def parse(line: str) -> str:
        command = [str(REAL_GCLOUD), *shlex.split(line)[1:]]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        *answers, control = pool.map(parse, [*kinds.values(), bogus])
    for line, answer in zip(kinds.values(), answers, strict=True):
        assert "You do not currently have an active account selected" in answer, (line, answer)
    assert "unrecognized arguments: --bogus" in control


def test_scripts_are_clean_and_tpu_sh_is_short_and_runs_in_the_bash_of_macos():
    """Its bash is 3.2: no ${x@Q}, no ${x,,}, no mapfile, no associative arrays."""
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(str(p) for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
    assert len(scripts) == 4
    command = [shellcheck, *scripts, "benchmarks/gpu.sh"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    text = (REPOSITORY / TPU).read_text()
    assert len(text.splitlines()) <= 250
    assert not re.search(r"\$\{\w+@|\$\{\w+(,,|\^\^)|mapfile|readarray|declare -A|&>>|\|&", text)
