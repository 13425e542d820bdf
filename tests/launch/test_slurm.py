"""slurm.sbatch, under an srun that runs its command here and an scontrol that notes its own."""

import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cloud import CONFIG, REPOSITORY, Cloud

SRUN = """
while case $1 in --*) true ;; *) false ;; esac; do shift; done
children='' highest=0
for task in $(seq 0 $((FAKE_TASKS - 1))); do SLURM_PROCID=$task "$@" & children="$children $!"; done
echo $children >"$FAKE_ROOT/tasks.new" && mv "$FAKE_ROOT/tasks.new" "$FAKE_ROOT/tasks"
for child in $children; do
  wait $child
  status=$?
  if [ $status -gt $highest ]; then highest=$status; fi
done
exit $highest
"""
# As Slurm does without --batch and at the time limit: all processes of the tasks, not the script.
SCANCEL = """
[ "$*" = "--signal=TERM 42" ] || exit 1
echo "$*" >>"$FAKE_ROOT/scancel"
for task in $(cat "$FAKE_ROOT/tasks"); do
  kill -TERM $task $(cat /proc/$task/task/$task/children)
done
"""
# Saves step 7 when it is asked once, and is cut short when it is asked twice.
SAVING = """
asked=0; trap 'asked=$((asked + 1))' TERM; touch "$FAKE_ROOT/begun-$SLURM_PROCID"
until [ $asked -gt 0 ]; do sleep 0.02; done
for i in $(seq 20); do sleep 0.02; done
for a; do case $a in --workdir=*) mkdir -p "${a#*=}/checkpoints/7" ;; esac; done
exit $((74 + asked))
"""


class Job:
    """A job in a checkout of its own, by default with a config and a workdir."""

    def __init__(self, cloud: Cloud, tmp_path: Path):
        self.cloud = cloud
        self.run = tmp_path / "a run"
        self.checkout = tmp_path / "checkout"
        python = self.checkout / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        (self.checkout / "launch").symlink_to(REPOSITORY / "launch")
        for name, text in {"srun": SRUN, "scancel": SCANCEL}.items():
            cloud.script(f"bin/{name}", text)
        cloud.script("bin/scontrol", 'echo "$*" >>"$FAKE_ROOT/scontrol"')
        check = 'case "$*" in *" --mode=check") [ ! -f "$FAKE_ROOT/bad" ] || exit 2; exit ;; esac'
        python.write_text(f'#!/bin/sh\n{check}\nshift 3; exec bash "$FAKE_ROOT/trainer" "$@"\n')
        python.chmod(0o755)

    def start(
        self, *arguments: str, restart: int = 0, tasks: int = 1, job_id: str = "42"
    ) -> subprocess.Popen[str]:
        (self.cloud.root / "tasks").unlink(missing_ok=True)
        return self.cloud.start(
            # As Slurm starts it; what begins with SIGINT ignored, as pytest may, cannot mind it.
            *("env", "--default-signal=INT", "bash", "launch/slurm.sbatch"),
            *(arguments or (CONFIG, f"--workdir={self.run}")),
            SLURM_SUBMIT_DIR=str(self.checkout),
            SLURM_JOB_ID=job_id,
            SBATCH="--nodes=2 --gpus-per-node=4",
            SLURM_RESTART_COUNT=str(restart),
            FAKE_TASKS=str(tasks),
        )

    def do(self, *arguments: str, **options: Any) -> tuple[int, str]:
        child = self.start(*arguments, **options)
        output, errors = child.communicate(timeout=600)
        return child.returncode, output + errors

    def requeued(self) -> int:
        path = self.cloud.root / "scontrol"
        lines = path.read_text().splitlines() if path.exists() else []
        assert set(lines) <= {"requeue 42"}
        return len(lines)


@pytest.fixture
def job(cloud: Cloud, tmp_path: Path) -> Job:
    return Job(cloud, tmp_path)


def test_saved_before_the_limit_it_is_queued_again_and_on_request_it_is_not(job: Job):
    """The request is scancel --batch --signal=INT, here twice, which reaches the script alone."""
    job.cloud.trainer(SAVING)
    for request in (False, True):
        child = job.start(tasks=2)
        job.cloud.wait(lambda: len(list(job.cloud.root.glob("begun-*"))) == 2)
        if request:
            for _ in range(2):
                os.kill(child.pid, signal.SIGINT)
                job.cloud.wait((job.cloud.root / "scancel").exists)
        else:
            command = [job.cloud.root / "bin" / "scancel", "--signal=TERM", "42"]
            subprocess.run(command, env=job.cloud.environment, check=True)
            (job.cloud.root / "scancel").unlink()
        output, errors = child.communicate(timeout=600)
        assert child.returncode == 75, output + errors
        assert "saved at step 7; " + ("sbatch the same" if request else "queued again") in output
        assert job.requeued() == 1
        for path in job.cloud.root.glob("begun-*"):
            path.unlink()
    assert (job.cloud.root / "scancel").read_text() == "--signal=TERM 42\n"


@pytest.mark.parametrize("runs", [[""], ["run-0", "run-1"]])
def test_three_restarts_without_progress_are_enough(runs, job: Job):
    """In a sweep, progress in any of its runs counts."""
    job.cloud.trainer("exit 75")
    restart = 0
    for run in runs:
        for step in ("1", "12"):
            (job.run / run / "checkpoints" / step).mkdir(parents=True)
            assert job.do(restart=restart)[0] == 75
            restart += 1
    (job.run / runs[-1] / "checkpoints" / "99.damaged").mkdir()
    ends = [job.do(restart=restart + i) for i in range(3)]
    assert [status for status, _ in ends] == [75, 75, 1]
    step = 12 * len(runs)
    assert ends[-1][1].endswith(f"three restarts without progress, still at step {step}\n")


@pytest.mark.parametrize(
    ("statuses", "ours", "message"),
    [
        ("0 0 0", 0, ""),
        ("75 75 75", 75, "saved at step 0; queued again"),
        ("75 1 75", 1, "a task ended with exit status 1\n"),
        ("75 0 137", 1, "a task ended with exit status 137\n"),
        ("2 2 2", 2, ""),
    ],
)
def test_of_several_tasks_one_that_failed_decides(statuses, ours, message, job: Job):
    """The status of srun is the highest of all, which of 1 and 75 is 75: saved."""
    job.cloud.trainer(f"set -- {statuses}; shift $SLURM_PROCID; exit $1")
    status, output = job.do(tasks=3)
    assert (status, message in output) == (ours, True), output
    assert job.requeued() == (ours == 75)


def test_bad_usage(job: Job):
    bad = {
        (CONFIG,): "--workdir is missing",
        ("--workdir=a",): "--config is missing",
        (CONFIG, "--workdir=a", "b"): "b is not an option of sync_jax.main",
    }
    for arguments, message in bad.items():
        status, output = job.do(*arguments)
        assert (status, message in output) == (2, True)
    (job.checkout / ".venv" / ".installed").write_text("incomplete\n")
    status, output = job.do()
    assert (status, "sh launch/venv.sh cuda makes it" in output) == (2, True)
    assert not (job.cloud.root / "tasks").exists()


def test_the_dry_run_is_the_command_and_arguments_arrive(job: Job):
    words = [CONFIG, f"--workdir={job.run}", '--config.a=it\'s $HOME (x); "y"', "--config.b=1\n2"]
    status, shown = job.do("--dry-run", *words)
    command = ["bash", "-c", f"printf '%s\\0' {shown}"]
    plain = subprocess.run(command, capture_output=True, text=True).stdout.split("\0")[:-1]
    assert (status, plain[-4:], plain[:2]) == (0, words, ["srun", "--wait=900"])
    assert shlex.split(shown)[2:7] == [
        *("bash", "launch/slurm.sbatch", "--task", ".venv/bin/python", "-u")
    ]
    job.cloud.script("bin/sbatch", 'printf "%s\\0" "$@" >"$FAKE_ROOT/sbatch"')
    assert job.do(*words, job_id="")[0] == 0  # not in a job: it submits itself
    submitted = (job.cloud.root / "sbatch").read_text().split("\0")[:-1]
    assert submitted == ["--nodes=2", "--gpus-per-node=4", "launch/slurm.sbatch", *words]
    (job.cloud.root / "bad").touch()
    (job.cloud.root / "sbatch").unlink()
    assert job.do("--dry-run", *words)[0] == 2  # a config that the trainer refuses
    assert job.do(*words, job_id="")[0] == 2
    assert not (job.cloud.root / "sbatch").exists()
    job.cloud.trainer('for a; do printf "%s\\0" "$a"; done >"$FAKE_ROOT/argv"')
    assert job.do(*words)[0] == 0
    assert (job.cloud.root / "argv").read_text().split("\0")[:-1] == words


def test_slurm_is_asked_to_queue_again_and_to_warn_above_the_first_command():
    head, *_ = (REPOSITORY / "launch" / "slurm.sbatch").read_text().split("\nset -uo")
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@300"} <= set(head.splitlines())
