"""supervise: machines that wait, expire, are taken away, or do not come."""

import re
import time

import pytest

from tests.launch.cloud import CONFIG, DELETE, MACHINE, WHERE, WORKDIR, Cloud, last_line, patient

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
