"""The supervise loop against a cloud that takes machines away, and runs that fail.

The runs are scripts here; test_verbs.py has the real trainer in the loop.
"""

import re

import pytest

from tests.launch.cloud import CONFIG, DELETE, MACHINE, WHERE, WORKDIR, Cloud, last_line, patient


def test_from_nothing_to_done(cloud: Cloud):
    cloud.trainer('save 5; echo "$@"; exit 0')
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "done; the results are in gs://bucket/run" in result.stderr
    assert last_line(result) == DELETE
    log = (cloud.home() / ".sync_jax" / "log").read_text()
    assert f"--config=configs/quickstart.py --workdir={cloud.bucket}/run\n" in log
    (kept,) = (cloud.bucket / "run" / "logs").iterdir()
    assert kept.read_text() in log
    assert not cloud.calls("delete")


def test_a_preempted_machine_is_made_anew_and_the_run_goes_on(cloud: Cloud):
    """Waiting, active, suspended; deleted, requested anew, set up and started again; twice."""
    cloud.trainer(patient(15))
    cloud.set(preempt_at=[5, 10])
    cloud.set(lives=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"] for _ in range(3)])
    (cloud.bucket / "precious").write_text("data")
    result = cloud.supervise("--", "--config.seed=3")
    assert result.returncode == 0, result.stderr
    assert re.search("the machine is (SUSPENDED|PREEMPTED): preemption 2", result.stderr)
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "READY"):
        assert result.stderr.count(f"machine sync: {state}") == 3
    assert len(cloud.calls("queued-resources", "create")) == 3
    # Nothing is ever deleted but the request with its machine.
    deleted = cloud.calls("delete")
    assert [call[1:5] for call in deleted] == [
        ["compute", "tpus", "queued-resources", "delete"]
    ] * 2
    assert not [call for call in cloud.calls() if "storage" in call or "rm" in call]
    assert (cloud.bucket / "precious").read_text() == "data"
    assert {p.name for p in (cloud.bucket / "run" / "checkpoints").iterdir()} == {"5", "10", "15"}
    # The same command each time.
    runs = [c for call in cloud.calls("ssh") for c in call if "host.sh run" in c]
    assert len(runs) == 3
    assert len(set(runs)) == 1
    assert "--config.seed=3" in runs[0]


def test_stopped_and_saved_on_a_living_machine_is_only_run_again(cloud: Cloud):
    cloud.trainer('mkdir "$workdir" && save 7 && exit 75; exit 0')
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "stopped by SIGTERM and saved at step 7: preemption 1" in result.stderr
    assert len(cloud.calls("create")) == 1
    assert not cloud.calls("delete")
    assert len(cloud.calls("scp")) == 1


def test_the_budget_of_preemptions(cloud: Cloud):
    cloud.trainer("save $(date +%s%N); exit 75")
    result = cloud.supervise("--preemptions=2", "--failures=0")
    assert result.returncode == 75
    assert "preemption 3\n" in result.stderr
    assert "more than 2; the same command goes on from the last checkpoint" in result.stderr
    assert last_line(result) == DELETE


def test_the_budget_of_failures_is_another(cloud: Cloud):
    cloud.trainer("save $(date +%s%N); exit 9")
    result = cloud.supervise("--preemptions=0", "--failures=2")
    assert result.returncode == 1
    assert "worker 0 ended with exit status 9: failure 3\n" in result.stderr
    assert "more than 2: see the logs" in result.stderr
    assert last_line(result) == DELETE


@pytest.mark.parametrize("status", [75, 1])
def test_three_restarts_without_progress_are_enough(status, cloud: Cloud):
    cloud.trainer(f"save 4; exit {status}")
    result = cloud.supervise("--preemptions=50", "--failures=50")
    assert result.returncode == 1
    assert "three restarts without progress, still at step 4" in result.stderr
    # The first start saved step 4, the restart after it showed that, and three came to nothing.
    assert result.stderr.count("started at step 4") == 3
    assert result.stderr.count("started at step 0") == 1
    assert last_line(result) == DELETE


def test_a_sweep_makes_progress_in_its_runs(cloud: Cloud):
    """Each with checkpoints of its own, and no more steps than the one before."""
    cloud.trainer(
        'n=$(ls "$workdir" 2>/dev/null | grep -c run-); mkdir -p "$workdir/run-$n/checkpoints/5"\n'
        "if [ $n -ge 6 ]; then exit 0; fi; exit 75"
    )
    result = cloud.supervise("--", "--mode=sweep", "--vary=seed=0,1,2")
    assert result.returncode == 0, result.stderr
    assert "started at step 30\n" in result.stderr


def test_a_checkpoint_being_written_is_no_progress(cloud: Cloud):
    cloud.trainer('mkdir -p "$workdir/checkpoints/9.orbax-checkpoint-tmp"; exit 75')
    result = cloud.supervise()
    assert result.returncode == 1
    assert "three restarts without progress, still at step 0" in result.stderr


def test_bad_input_is_not_tried_again(cloud: Cloud):
    cloud.trainer("exit 2")
    result = cloud.supervise()
    assert result.returncode == 2
    assert "the config or its input is at fault" in result.stderr
    assert result.stderr.count("started at") == 1


def test_what_an_earlier_run_was_refused_for_does_not_count(cloud: Cloud):
    """The config is mended; then the first start does not reach the host."""
    cloud.trainer("exit 2")
    assert cloud.supervise().returncode == 2
    cloud.trainer("exit 0")
    cloud.set(fail={"start": 1})
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "the run cannot be started on every worker (1 in a row)" in result.stderr


def test_unprepared_data_is_not_tried_again(cloud: Cloud):
    cloud.trainer("exit 0")
    result = cloud.supervise("--", "--config.data.data_dir=gs://bucket/data")
    assert result.returncode == 2
    assert f"{cloud.bucket}/data is empty: prepare the data once" in result.stderr
    assert "the config or its input is at fault: worker 0 ended with exit status 2" in result.stderr
    assert len([c for call in cloud.calls("ssh") for c in call if "host.sh run" in c]) == 1


def test_two_that_watch_have_one_run(cloud: Cloud):
    """Neither stops what the other has started or sets up."""
    cloud.trainer('save 5; until [ -e "$HOME/enough" ]; do sleep 0.05; done; exit 0')
    machine = ["launch/tpu.sh", "supervise", *MACHINE, WORKDIR, CONFIG, "--yes"]
    assert cloud.run("launch/tpu.sh", "create", *MACHINE, "--yes").returncode == 0
    said = [cloud.root / f"said-{number}" for number in range(2)]
    for file in said:
        file.touch()
    children = [
        cloud.start("sh", "-c", f'exec "$@" 2>{file}', "-", *machine, SYNC_JAX_PATIENCE="1000")
        for file in said
    ]
    cloud.wait(lambda: all(re.search("started at step|found running", s.read_text()) for s in said))
    (cloud.home() / "enough").touch()
    for child, words in zip(children, said, strict=True):
        child.communicate(timeout=1000)
        assert child.returncode == 0, words.read_text()
    assert (cloud.home() / ".sync_jax" / "log").read_text().count("starts") == 1
    assert not [c for call in cloud.calls("ssh") for c in call if "host.sh stop" in c]


def test_a_run_that_is_going_on_is_watched(cloud: Cloud):
    cloud.trainer(patient(10))
    assert cloud.tpu("create", "--type=v4-8", "--yes").returncode == 0
    assert cloud.tpu("setup", WORKDIR).returncode == 0
    assert cloud.tpu("run", WORKDIR, CONFIG).returncode == 0
    cloud.wait((cloud.bucket / "run" / "checkpoints" / "5").exists)
    machine = [*WHERE, "--type=v4-8"]
    words = ["launch/tpu.sh", "supervise", *machine, WORKDIR, CONFIG, "--yes"]
    said = cloud.root / "said"
    said.touch()
    child = cloud.start("sh", "-c", f'exec "$@" 2>{said}', "-", *words)
    other = cloud.run(
        *("launch/tpu.sh", "supervise", *machine, CONFIG, "--yes", "--workdir=gs://bucket/other")
    )
    assert other.returncode == 1
    assert "another run is going on there" in other.stderr
    cloud.wait(lambda: "found running at step 5" in said.read_text())
    assert cloud.tpu("stop").returncode == 0
    child.communicate(timeout=1000)
    assert child.returncode == 0, said.read_text()
    assert "saved at step 5: preemption 1" in said.read_text()


def test_interrupted_supervision_leaves_the_run_alone(cloud: Cloud):
    cloud.trainer(patient(10))
    child = cloud.start("launch/tpu.sh", "supervise", *MACHINE, WORKDIR, CONFIG, "--yes")
    cloud.wait((cloud.bucket / "run" / "checkpoints" / "5").exists)
    cloud.wait(lambda: len(cloud.calls("list")) > 14)
    child.terminate()
    output, errors = child.communicate(timeout=1000)
    assert child.returncode == 1
    assert "no longer watched: what runs goes on" in errors
    assert output.strip().splitlines()[-1].strip() == DELETE
    assert "state=running" in cloud.tpu("status", WORKDIR).stdout
