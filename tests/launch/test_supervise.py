"""The supervise loop against a cloud that takes machines away, and runs that fail.

The runs are scripts here; test_verbs.py has the real trainer in the loop.
"""

import re
import time
from pathlib import Path

import pytest

from tests.launch.cloud import (
    CONFIG,
    LIMIT,
    MACHINE,
    WHERE,
    WORKDIR,
    Cloud,
    dead_mounts,
    hanging_mounts,
)

DELETE = f"launch/tpu.sh delete {' '.join(WHERE)}"


def last_line(result) -> str:
    return result.stdout.strip().splitlines()[-1].strip()


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


def patient(last: int) -> str:
    """Saves five steps further each time, and waits for SIGTERM: the real trainer's manners."""
    return f"""
trap 'exit 75' TERM
n=$(($(ls "$workdir/checkpoints" 2>/dev/null | wc -l) * 5 + 5))
save $n
if [ $n -ge {last} ]; then exit 0; fi
for i in $(seq 9999); do sleep 0.05; done
"""


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


REFUSED = [["ACCEPTED", "FAILED\tno quota"], ["ACCEPTED", "PROVISIONING", "FAILED\tno room"]]


def test_a_request_that_fails_is_a_failure_and_made_anew(cloud: Cloud):
    cloud.trainer("exit 0")
    cloud.set(lives=list(REFUSED))
    result = cloud.supervise("--preemptions=0", "--failures=2")
    assert result.returncode == 0, result.stderr
    assert "the request was not served: FAILED (no quota): failure 1\n" in result.stderr
    assert "the request was not served: FAILED (no room): failure 2\n" in result.stderr
    assert len(cloud.calls("create")) == 3


def test_requests_that_fail_spend_the_budget_of_failures(cloud: Cloud):
    cloud.set(lives=list(REFUSED))
    result = cloud.supervise("--preemptions=0", "--failures=1")
    assert result.returncode == 1
    assert "more than 1: another type or zone may have room" in result.stderr
    assert "preemption" not in result.stderr
    assert last_line(result) == DELETE


def test_a_request_that_fails_once_it_was_served_is_a_preemption(cloud: Cloud):
    cloud.trainer(patient(10))
    cloud.set(preempt_at=[5], suspension=["FAILED"])
    result = cloud.supervise("--failures=0")
    assert result.returncode == 0, result.stderr
    assert "the machine is FAILED: preemption 1" in result.stderr


def test_an_expired_request_ends_it_and_only_the_request_is_deleted(cloud: Cloud):
    cloud.set(lives=[["WAITING_FOR_RESOURCES"]])
    (cloud.bucket / "precious").write_text("data")
    result = cloud.supervise("--valid-until=0m1s", "--preemptions=50", "--failures=50")
    assert result.returncode == 1
    assert "the request was not served within 0m1s: FAILED (the valid-until" in result.stderr
    assert last_line(result) == DELETE
    assert len(cloud.calls("create")) == 1
    assert [call[3:6] for call in cloud.calls("delete")] == [["queued-resources", "delete", "sync"]]
    assert [p.name for p in cloud.bucket.iterdir()] == ["precious"]


def test_a_request_that_expires_between_two_calls_has_expired(cloud: Cloud):
    """When it was made, the cloud knows: the second call makes no other."""
    cloud.set(lives=[["WAITING_FOR_RESOURCES"]])
    command = ["launch/tpu.sh", "supervise", *MACHINE, WORKDIR, CONFIG, "--valid-until=2s", "--yes"]
    child = cloud.start(*command)
    cloud.wait(lambda: bool(cloud.calls("create")))
    child.terminate()
    child.communicate(timeout=1000)
    time.sleep(2)
    result = cloud.run(*command)
    assert result.returncode == 1
    assert "the request was not served within 2s: FAILED (the valid-until" in result.stderr
    assert len(cloud.calls("create")) == len(cloud.calls("delete")) == 1


def test_a_machine_of_another_type_is_not_taken(cloud: Cloud):
    assert cloud.tpu("create", "--type=v4-8", "--yes").returncode == 0
    result = cloud.supervise()
    assert result.returncode == 2
    assert "there is a machine sync already, and it is a v4-8: say --type=v4-8" in result.stderr
    assert not cloud.calls("ssh")
    assert not cloud.calls("delete")


@pytest.mark.parametrize("verb", ["create", "supervise"])
def test_a_queue_may_take_long(verb, cloud: Cloud):
    """Longer than patience, which is six looks here; the queue's limit is --valid-until."""
    cloud.trainer("exit 0")
    cloud.set(lives=[["ACCEPTED"] + ["WAITING_FOR_RESOURCES"] * 8 + ["ACTIVE"]])
    more = [WORKDIR, CONFIG] if verb == "supervise" else []
    result = cloud.run("launch/tpu.sh", verb, *MACHINE, *more, "--yes")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("verb", ["create", "supervise"])
@pytest.mark.parametrize("state", ["PROVISIONING", "UNKNOWN"])
def test_a_machine_that_does_not_get_ready_is_given_up(verb, state, cloud: Cloud):
    """Of the request, and of the machine itself."""
    if state == "PROVISIONING":
        cloud.set(lives=[[state]])
    else:
        cloud.set(node_lives=[[state]])
    more = [WORKDIR, CONFIG] if verb == "supervise" else []
    result = cloud.run("launch/tpu.sh", verb, *MACHINE, *more, "--yes")
    assert result.returncode == 1
    assert f"still {state} after 6 looks: given up" in result.stderr
    assert last_line(result) == DELETE
    assert not cloud.calls("delete")


@pytest.mark.parametrize("state", ["REPAIRING", "UNKNOWN", "STOPPED", "DELETING"])
def test_a_machine_that_is_there_no_more_is_given_up(state, cloud: Cloud):
    cloud.trainer(patient(10))
    cloud.set(node_lives=[["READY"] * 3 + [state]])
    result = cloud.supervise()
    assert result.returncode == 1
    assert "started at step 0" in result.stderr
    assert f"machine sync: {state}\n" in result.stderr
    assert f"still {state} after 6 looks: given up" in result.stderr
    assert not cloud.calls("delete")


def test_a_repair_is_waited_for(cloud: Cloud):
    cloud.trainer(patient(5))
    cloud.set(node_lives=[["READY", "REPAIRING", "UNKNOWN", "REPAIRING", "READY"]])
    result = cloud.supervise("--preemptions=0", "--failures=0")
    assert result.returncode == 0, result.stderr
    assert len(cloud.calls("create")) == 1


def test_a_machine_being_taken_away_is_deleted_once_it_lets(cloud: Cloud):
    """The preemption is counted once, however often its deletion fails."""
    cloud.trainer(patient(10))
    cloud.set(preempt_at=[5], suspension=["SUSPENDING", "SUSPENDED"], fail={"delete": 2})
    result = cloud.supervise("--preemptions=1")
    assert result.returncode == 0, result.stderr
    assert re.search("the machine is (SUSPENDING|PREEMPTED): preemption 1", result.stderr)
    assert "it cannot be deleted (2 in a row)" in result.stderr
    assert "preemption 2" not in result.stderr
    assert len(cloud.calls("delete")) == 3


def test_a_deletion_that_goes_on_though_its_call_failed_is_no_second_preemption(cloud: Cloud):
    cloud.trainer(patient(10))
    cloud.set(preempt_at=[5], fail={"delete": 1})
    cloud.set(suspension=["SUSPENDED", "DELETING", "DELETING", "GONE"])
    result = cloud.supervise("--preemptions=1")
    assert result.returncode == 0, result.stderr
    assert "machine sync: DELETING\n" in result.stderr
    assert "preemption 2" not in result.stderr


def test_the_logs_of_machines_that_are_gone_are_kept(cloud: Cloud):
    cloud.trainer(f"sleep 1.1; touch $HOME; echo I am $HOME\n{patient(15)}")
    cloud.set(preempt_at=[5, 10])
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    logs = sorted((cloud.bucket / "run" / "logs").iterdir())
    assert [f"sync-{i}/0\n" in log.read_text() for i, log in enumerate(logs, 1)] == [True] * 3


def test_a_machine_that_cannot_be_deleted_is_given_up(cloud: Cloud):
    cloud.trainer(patient(10))
    cloud.set(preempt_at=[5], fail={"delete": 1000})
    result = cloud.supervise()
    assert result.returncode == 1
    assert "it cannot be deleted (6 in a row)" in result.stderr
    assert len(cloud.calls("create")) == 1
    assert last_line(result) == DELETE


def test_a_request_whose_machine_is_lost_is_made_anew(cloud: Cloud):
    cloud.trainer(patient(10))
    cloud.set(node_lives=[["READY"] * 9 + ["GONE"]])
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "the machine is LOST: preemption 1" in result.stderr


def test_what_somebody_else_deletes_is_made_anew(cloud: Cloud):
    cloud.trainer(patient(10))
    cloud.set(lives=[["ACTIVE"] * 9 + ["DELETING", "DELETING", "GONE"]])
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "machine sync: DELETING\n" in result.stderr
    assert "the machine is no longer there: preemption 1" in result.stderr
    assert not cloud.calls("delete")


def test_a_machine_on_demand(cloud: Cloud):
    cloud.trainer(patient(10))
    cloud.set(preempt_at=[5])
    machine = [*WHERE, "--type=v4-8", WORKDIR, CONFIG, "--yes"]
    result = cloud.run("launch/tpu.sh", "supervise", *machine)
    assert result.returncode == 0, result.stderr
    created = cloud.calls("create")
    assert [call[3] for call in created] == ["tpu-vm", "tpu-vm"]
    assert "--version=tpu-ubuntu2204-base" in created[0]
    assert [call[3] for call in cloud.calls("delete")] == ["tpu-vm"]


def test_what_is_not_listed_yet_is_waited_for(cloud: Cloud):
    """Neither the request, nor the machine of one that is active."""
    cloud.trainer("exit 0")
    cloud.set(lives=[["HIDDEN"] * 2 + ["ACTIVE"]], node_lives=[["HIDDEN"] * 2 + ["READY"]])
    result = cloud.supervise("--preemptions=0", "--failures=0")
    assert result.returncode == 0, result.stderr
    assert "not in the lists: the request (2 in a row)" in result.stderr
    assert "not in the lists: the machine of the request (" in result.stderr
    assert len(cloud.calls("create")) == 1
    assert not cloud.calls("delete")


@pytest.mark.parametrize("verb", ["create", "supervise"])
def test_what_is_never_listed_is_given_up(verb, cloud: Cloud):
    """As gone, first; and there is no other of the name."""
    cloud.set(lives=[["HIDDEN"]])
    more = [WORKDIR, CONFIG] if verb == "supervise" else []
    result = cloud.run("launch/tpu.sh", verb, *MACHINE, *more, "--yes")
    assert result.returncode == 1
    assert "(6 in a row)\n" in result.stderr
    if verb == "supervise":
        assert "not in the lists: the request (5 in a row)\n" in result.stderr
        assert "the machine is no longer there: preemption 1\n" in result.stderr
        assert "preemption 2" not in result.stderr
    assert not cloud.calls("delete")


def test_what_does_not_answer_is_asked_again(cloud: Cloud):
    """The lists first, then a host; each is ended with all that it has started."""
    cloud.trainer("exit 0")
    cloud.set(hang={"list": 2, "ssh": 1})
    result = cloud.supervise("--preemptions=0", "--failures=0", SYNC_JAX_TIMEOUT=LIMIT)
    assert result.returncode == 0, result.stderr
    assert f"no answer within {LIMIT} s (2 in a row)" in result.stderr
    assert f"no answer within {LIMIT} s (1 in a row)" in result.stderr.split("READY")[1]
    assert len(cloud.calls("create")) == 1
    left = ("sleep", "gcloud")
    cloud.wait(lambda: not [x for x in cloud.left().values() if any(word in x for word in left)])


def test_what_takes_long_has_a_limit_too(cloud: Cloud):
    """A creation, a copy, a deletion."""
    cloud.trainer(patient(10))
    cloud.set(hang={"create": 1, "scp": 1, "delete": 1}, preempt_at=[5])
    result = cloud.supervise("--preemptions=1", "--failures=0", SYNC_JAX_LONG_TIMEOUT=LIMIT)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"no answer within {LIMIT} s\n") == 3
    for what in ("none can be created", "the machine cannot be set up", "it cannot be deleted"):
        assert re.search(rf"{what} \(\d in a row\)", result.stderr)


def test_an_installation_that_hangs_is_ended_and_made_again(cloud: Cloud):
    """On the host too, where it would refuse every other."""
    cloud.trainer("exit 0")
    hangs = cloud.root / "pip-hangs"
    hangs.touch()
    result = cloud.supervise("--preemptions=0", "--failures=0", SYNC_JAX_LONG_TIMEOUT=LIMIT)
    assert result.returncode == 0, result.stderr
    assert "the machine cannot be set up (1 in a row)" in result.stderr
    pip = Path("/proc") / hangs.read_text().strip() / "cmdline"
    assert not pip.exists() or not pip.read_text()  # ended, and perhaps nobody has asked how


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
        cloud.start("sh", "-c", f'exec "$@" 2>{said}', "-", *machine, SYNC_JAX_PATIENCE="1000")
        for said in said
    ]
    cloud.wait(lambda: all(re.search("started at step|found running", s.read_text()) for s in said))
    (cloud.home() / "enough").touch()
    for child, words in zip(children, said, strict=True):
        child.communicate(timeout=1000)
        assert child.returncode == 0, words.read_text()
    assert (cloud.home() / ".sync_jax" / "log").read_text().count("starts") == 1
    assert not [c for call in cloud.calls("ssh") for c in call if "host.sh stop" in c]


def test_a_bucket_that_hangs_for_a_while_is_no_failure(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.environment["SYNC_JAX_HOST_LIMIT"] = "5"
    cloud.trainer(
        'save 5; if [ $FAKE_WORKER = 1 ]; then touch "$HOME/hangs"\n'
        'until [ -e "$HOME/looked" ]; do sleep 0.02; done; rm "$HOME/hangs"; fi'
    )
    hanging_mounts(cloud)
    result = cloud.supervise("--preemptions=0", "--failures=0")
    assert result.returncode == 0, result.stderr
    assert re.search(r"worker 1 has a bucket that does not answer \(\d in a row\)", result.stderr)


def test_what_fails_for_a_while_is_tried_again_and_no_preemption(cloud: Cloud):
    cloud.trainer("exit 0")
    cloud.set(fail={"ssh": 3, "scp": 2, "list": 3, "create": 2})
    result = cloud.supervise("--preemptions=0", "--failures=0")
    assert result.returncode == 0, result.stderr
    assert "the service is not there (3 in a row)" in result.stderr
    assert "none can be created (5 in a row)" in result.stderr
    assert "Connection timed out (3 in a row)" in result.stderr
    assert "the machine cannot be set up (5 in a row)" in result.stderr


@pytest.mark.parametrize("what", ["ssh", "scp", "list", "create"])
def test_what_fails_for_good_is_given_up_and_nothing_is_deleted(what, cloud: Cloud):
    cloud.set(fail={what: 1000})
    result = cloud.supervise()
    assert result.returncode == 1
    assert "(6 in a row)" in result.stderr
    assert "given up" in result.stderr
    assert last_line(result) == DELETE
    assert not cloud.calls("delete")


def test_a_half_failed_installation_is_made_again_before_anything_runs(cloud: Cloud):
    cloud.trainer("exit 0")
    (cloud.root / "pip-fails").touch()
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "the machine cannot be set up (1 in a row)" in result.stderr
    assert len((cloud.home() / "installed").read_text().splitlines()) == 2
    assert (cloud.home() / ".sync_jax" / "log").read_text().count("starts") == 1


OTHERS_BEGUN = (
    'until [ -e "$FAKE_ROOT/begun-0" ] && [ -e "$FAKE_ROOT/begun-2" ]; do sleep 0.02; done'
)
ONE_FAILS = f"""
trap 'echo asked; exit 75' TERM
if [ -d "$workdir" ]; then exit 0; fi
touch "$FAKE_ROOT/begun-$FAKE_WORKER"
if [ $HOSTNAME = t1v-n-0123abcd-w-1 ]; then
  {OTHERS_BEGUN}
  mkdir -p "$workdir"; exit 1
fi
for i in $(seq 9999); do sleep 0.05; done
"""


def test_one_worker_of_three_fails_and_the_others_are_stopped(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS)
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "worker 1 ended with exit status 1: failure 1" in result.stderr
    for worker in (0, 2):
        assert "asked\n" in (cloud.home(worker) / ".sync_jax" / "log").read_text()
    # Every command went to all.
    assert {a for call in cloud.calls("ssh") for a in call if "--worker" in a} == {"--worker=all"}


def test_workers_at_odds_are_stopped_after_a_while(slice_of_three: Cloud):
    """One has ended well, and the others hang."""
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS.replace("exit 1", "exit 0"))
    result = cloud.supervise(SYNC_JAX_PATIENCE="3")
    assert result.returncode == 0, result.stderr
    assert "workers still run" in result.stderr
    assert "preemption 1" in result.stderr


def test_a_worker_that_has_lost_its_home_is_set_up_anew(slice_of_three: Cloud):
    """As after a repair: of its run it knows nothing, and the others have saved."""
    cloud = slice_of_three
    cloud.trainer(
        'trap "exit 75" TERM; if [ -e $HOME/again ]; then exit 0; fi; touch $HOME/again\n'
        "if [ $HOSTNAME = t1v-n-0123abcd-w-1 ]; then\n"
        "  rm -rf $HOME/sync_jax $HOME/.sync_jax; sleep 0.2; kill -KILL $PPID $$\n"
        "fi\nexit 75"
    )
    result = cloud.supervise(SYNC_JAX_PATIENCE="3")
    assert result.returncode == 0, result.stderr
    assert "workers still run: failure 1" in result.stderr


def test_a_worker_that_was_killed_counts_as_failed(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS.replace("exit 1", "kill -KILL $PPID $$"))
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "worker 1 lost its run: failure 1" in result.stderr


def test_a_worker_without_its_bucket_is_a_failure(slice_of_three: Cloud):
    """Its gcsfuse has ended: the run can save no more, and the next start mounts anew."""
    cloud = slice_of_three
    cloud.trainer(
        'trap "exit 75" TERM; if [ -e $HOME/again ]; then exit 0; fi\n'
        'touch $HOME/again "$FAKE_ROOT/begun-$FAKE_WORKER"\n'
        f"if [ $HOSTNAME = t1v-n-0123abcd-w-1 ]; then {OTHERS_BEGUN}; touch $HOME/dead; fi\n"
        "for i in $(seq 9999); do sleep 0.05; done"
    )
    dead_mounts(cloud)
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "worker 1 has lost its bucket, for gcsfuse has ended there: failure 1" in result.stderr
    assert "worker 1: the mount of gs://bucket is dead" in result.stderr


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


def test_what_failed_while_nobody_watched_is_stopped_and_started_again(slice_of_three: Cloud):
    """One worker has ended, the others wait for it and hold their machines."""
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS)
    for verb in (["create", "--type=v5litepod-16", "--spot", "--yes"], ["setup"], ["run", CONFIG]):
        result = cloud.tpu(verb[0], *verb[1:], WORKDIR)
        assert result.returncode == 0, result.stderr
    cloud.wait((cloud.home(1) / ".sync_jax" / "exit").exists)
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "cannot be set up" not in result.stderr
    for worker in (0, 2):
        assert "asked\n" in (cloud.home(worker) / ".sync_jax" / "log").read_text()
