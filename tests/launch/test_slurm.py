"""slurm.sbatch, under an srun that runs its command here and an scontrol that notes its own."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.cloud import CONFIG, REPOSITORY, Cloud

SRUN = """
echo "$*" >>"$FAKE_ROOT/srun"
while case $1 in --*) true ;; *) false ;; esac; do shift; done
children='' highest=0
for task in $(seq 0 $((${FAKE_TASKS:-1} - 1))); do
  SLURM_PROCID=$task "$@" &
  children="$children $!"
done
echo $children >"$FAKE_ROOT/tasks.new" && mv "$FAKE_ROOT/tasks.new" "$FAKE_ROOT/tasks"
for child in $children; do
  wait $child
  status=$?
  if [ $status -gt $highest ]; then highest=$status; fi
done
exit $highest
"""
# As Slurm does without --batch: all processes of the tasks, and not the script.
SCANCEL = """
[ "$*" = "--signal=TERM 42" ] || exit 1
echo "$*" >>"$FAKE_ROOT/scancel"
until [ -e "$FAKE_ROOT/tasks" ]; do sleep 0.05; done
for task in $(cat "$FAKE_ROOT/tasks"); do
  kill -TERM $task $(cat /proc/$task/task/$task/children)
done
"""
PYTHON = """
if [ -f "$FAKE_ROOT/trainer" ]; then shift 3; exec bash "$FAKE_ROOT/trainer" "$@"; fi
"""


class Job:
    """A job in a checkout of its own."""

    def __init__(self, cloud: Cloud, tmp_path: Path):
        self.cloud = cloud
        self.checkout = tmp_path / "checkout"
        self.checkout.mkdir()
        for name in ("configs", "launch", "sync_jax"):
            (self.checkout / name).symlink_to(REPOSITORY / name)
        cloud.script("bin/srun", SRUN)
        cloud.script("bin/scancel", SCANCEL)
        cloud.script("bin/scontrol", 'echo "$*" >>"$FAKE_ROOT/scontrol"')
        cloud.script("python", PYTHON + f"exec '{sys.executable}' \"$@\"")
        (self.checkout / ".venv" / "bin").mkdir(parents=True)
        (self.checkout / ".venv" / ".installed").write_text("all of it")
        (self.checkout / ".venv" / "bin" / "python").symlink_to(cloud.root / "python")

    def start(self, *arguments: str, restart: int = 0, tasks: int = 1) -> subprocess.Popen[str]:
        (self.cloud.root / "tasks").unlink(missing_ok=True)
        return self.cloud.start(
            # As Slurm starts it; what begins with SIGINT ignored, as pytest may, cannot mind it.
            *("env", "--default-signal=INT", "bash", "launch/slurm.sbatch", *arguments),
            SLURM_SUBMIT_DIR=str(self.checkout),
            SLURM_JOB_ID="42",
            SLURM_RESTART_COUNT=str(restart),
            FAKE_TASKS=str(tasks),
            JAX_PLATFORMS="cpu",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )

    def do(self, *arguments: str, restart: int = 0, tasks: int = 1) -> tuple[int, str]:
        child = self.start(*arguments, restart=restart, tasks=tasks)
        output, errors = child.communicate(timeout=1000)
        return child.returncode, output + errors

    def terminate(self) -> None:
        """As --signal=TERM@300 does: all processes of the tasks, and not the script."""
        self.cloud.wait((self.cloud.root / "tasks").exists)
        for task in (self.cloud.root / "tasks").read_text().split():
            children = Path(f"/proc/{task}/task/{task}/children").read_text().split()
            for process in (task, *children):
                os.kill(int(process), signal.SIGTERM)

    def requeued(self) -> list[str]:
        path = self.cloud.root / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def job(cloud: Cloud, tmp_path: Path) -> Job:
    return Job(cloud, tmp_path)


@pytest.mark.slow
def test_saved_before_the_limit_queued_again_and_resumed_with_the_real_trainer(job: Job, tmp_path):
    run = tmp_path / "run"
    command = tiny.command(tiny.prepare(tmp_path), run, "--config.method=ce")[3:]
    child = job.start(*command)
    job.cloud.wait((run / "config.json").exists)  # from here on it minds SIGTERM
    job.terminate()
    output, errors = child.communicate(timeout=1000)
    assert child.returncode == 75, errors
    assert "saved at step" in output
    assert job.requeued() == ["requeue 42"]
    status, output = job.do(*command, restart=1)
    assert status == 0, output
    assert "resuming at step" in output
    assert (run / "report.json").exists()
    assert job.requeued() == ["requeue 42"]
    first, second = (job.cloud.root / "srun").read_text().splitlines()
    assert first == second
    assert first.startswith(
        "--wait=900 bash launch/slurm.sbatch --task .venv/bin/python -u -m sync_jax.main --config="
    )


def test_three_restarts_without_progress_are_enough(job: Job, tmp_path):
    job.cloud.trainer("exit 75")
    words = [CONFIG, f"--workdir={tmp_path}/run"]
    checkpoints = tmp_path / "run" / "checkpoints"
    for restart in range(3):
        (checkpoints / str(restart + 1)).mkdir(parents=True)
        assert job.do(*words, restart=restart)[0] == 75
    (checkpoints / "9.damaged").mkdir()
    assert [job.do(*words, restart=restart)[0] for restart in (3, 4, 5)] == [75, 75, 1]
    assert len(job.requeued()) == 5


def test_a_sweep_makes_progress_in_its_runs(job: Job, tmp_path):
    job.cloud.trainer("exit 75")
    run = tmp_path / "a sweep"
    for restart in range(6):
        (run / f"run-{restart // 3}" / "checkpoints" / str(restart % 3 + 1)).mkdir(parents=True)
        assert job.do(CONFIG, f"--workdir={run}", "--mode=sweep", restart=restart)[0] == 75
    assert (
        "still at step 6"
        in [job.do(CONFIG, f"--workdir={run}", restart=restart)[1] for restart in (6, 7, 8)][-1]
    )


def test_asked_to_stop_it_saves_and_is_not_queued_again(job: Job, tmp_path):
    """By scancel --batch --signal=INT, twice, which reaches the script and none of the tasks."""
    save = 'mkdir -p "$workdir/checkpoints/7"'
    job.cloud.trainer(
        "asked=0; trap 'asked=$((asked + 1))' TERM; touch \"$FAKE_ROOT/begun-$SLURM_PROCID\"\n"
        "until [ $asked -gt 0 ]; do sleep 0.02; done\n"
        f"for i in $(seq 20); do sleep 0.02; done; {save}; exit $((74 + asked))"
    )
    child = job.start(CONFIG, f"--workdir={tmp_path}/run", tasks=2)
    job.cloud.wait(lambda: len(list(job.cloud.root.glob("begun-*"))) == 2)
    child.send_signal(signal.SIGINT)
    job.cloud.wait((job.cloud.root / "scancel").exists)
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=1000)
    assert child.returncode == 75, output + errors
    assert output.endswith("saved at step 7; sbatch the same goes on from there\n")
    assert (job.cloud.root / "scancel").read_text() == "--signal=TERM 42\n"
    assert job.requeued() == []


def test_what_readers_are_told_stops_a_job_is_what_the_script_minds():
    script = (REPOSITORY / "launch" / "slurm.sbatch").read_text()
    told = "scancel --batch --signal=INT JOB"
    assert told in script
    assert f"`{told}`" in (REPOSITORY / "launch" / "README.md").read_text()
    assert "\ntrap stop INT " in script


@pytest.mark.parametrize(("status", "ours"), [(0, 0), (1, 1), (2, 2), (137, 1)])
def test_exit_statuses_and_nothing_queued_again(status, ours, job: Job, tmp_path):
    job.cloud.trainer(f"exit {status}")
    assert job.do(CONFIG, f"--workdir={tmp_path}/run")[0] == ours
    assert job.requeued() == []


@pytest.mark.parametrize(
    ("statuses", "ours", "message"),
    [
        ("75 75 75", 75, "saved at step 0; queued again"),
        ("0 0 0", 0, ""),
        ("75 1 75", 1, "a task ended with exit status 1\n"),
        ("1 75 0", 1, "a task ended with exit status 1\n"),
        ("75 0 137", 1, "a task ended with exit status 137\n"),
        ("2 2 2", 2, ""),
    ],
)
def test_of_several_tasks_one_that_failed_decides(statuses, ours, message, job: Job, tmp_path):
    """srun's own status is the highest of all, which of 1 and 75 is 75: saved."""
    job.cloud.trainer(f"set -- {statuses}; shift $SLURM_PROCID; exit $1")
    status, output = job.do(CONFIG, f"--workdir={tmp_path}/run", tasks=3)
    assert (status, message in output) == (ours, True), output
    assert len(job.requeued()) == (ours == 75)


def test_a_sigterm_to_all_of_a_task_is_one_to_the_trainer(job: Job, tmp_path):
    job.cloud.trainer(
        "asked=0; trap 'asked=$((asked + 1))' TERM; touch \"$FAKE_ROOT/begun-$SLURM_PROCID\"\n"
        "until [ $asked -gt 0 ]; do sleep 0.02; done\n"
        "for i in $(seq 20); do sleep 0.02; done; exit $((74 + asked))"
    )
    child = job.start(CONFIG, f"--workdir={tmp_path}/run", tasks=2)
    job.cloud.wait(lambda: len(list(job.cloud.root.glob("begun-*"))) == 2)
    job.terminate()
    output, errors = child.communicate(timeout=1000)
    assert child.returncode == 75, output + errors
    assert job.requeued() == ["requeue 42"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG], "--workdir is missing"),
        (["--workdir=a"], "--config is missing"),
        ([CONFIG, "--workdir=a", "b"], "b is no option of sync_jax.main"),
    ],
)
def test_bad_usage(arguments, message, job: Job):
    status, output = job.do(*arguments)
    assert status == 2
    assert message in output
    assert not (job.cloud.root / "srun").exists()


def test_a_half_made_venv_is_not_used(job: Job):
    (job.checkout / ".venv" / ".installed").write_text("incomplete\n")
    status, output = job.do(CONFIG, "--workdir=a")
    assert status == 2
    assert "sh launch/venv.sh cuda makes it" in output


def test_the_dry_run_is_the_command_and_arguments_arrive(job: Job, tmp_path):
    nasty = ['--config.a=it\'s $HOME (x); "y"', "--config.b=two\nlines"]
    words = [CONFIG, f"--workdir={tmp_path}/a run", *nasty]
    status, shown = job.do("--dry-run", *words)
    assert status == 0
    plain = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {shown}"], capture_output=True, text=True
    )
    assert plain.stdout.split("\0")[:-1][-4:] == words
    assert shlex.split(shown)[:2] == ["srun", "--wait=900"]
    job.cloud.trainer('for a; do printf "%s\\0" "$a"; done >"$FAKE_ROOT/argv"')
    assert job.do(*words)[0] == 0
    assert (job.cloud.root / "argv").read_text().split("\0")[:-1] == words


def test_what_the_head_of_the_file_asks_of_slurm():
    text = (REPOSITORY / "launch" / "slurm.sbatch").read_text()
    options = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(options)
    # Slurm reads such lines only above the first command.
    assert text.index("set -uo pipefail") > text.rindex("#SBATCH")
