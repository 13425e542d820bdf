"""supervise: what fails or does not answer is tried again, and given up in the end."""

import re
from pathlib import Path

import pytest

from tests.launch.cloud import DELETE, LIMIT, Cloud, last_line, patient


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


def test_what_fails_for_a_while_is_tried_again_and_no_preemption(cloud: Cloud):
    cloud.trainer("exit 0")
    cloud.set(fail={"ssh": 3, "scp": 2, "list": 3, "create": 2})
    result = cloud.supervise("--preemptions=0", "--failures=0")
    assert result.returncode == 0, result.stderr
    assert "the service is not there (3 in a row)" in result.stderr
    assert "none can be created (5 in a row)" in result.stderr
    assert "Connection timed out (3 in a row)" in result.stderr
    assert "the machine cannot be set up (5 in a row)" in result.stderr


def test_a_start_that_did_not_come_through_stops_nothing(cloud: Cloud):
    """Another who watches may have begun it meanwhile."""
    cloud.trainer("exit 0")
    cloud.set(fail={"start": 1})
    result = cloud.supervise("--preemptions=0", "--failures=0")
    assert result.returncode == 0, result.stderr
    assert "the run cannot be started on every worker (1 in a row)" in result.stderr
    assert not [c for call in cloud.calls("ssh") for c in call if "host.sh stop" in c]


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
