"""The supervise loop against a cloud that takes machines away, and runs that fail."""

import json

import pytest

from tests.launch.cloud import CONFIG, WHERE, WORKDIR, Cloud

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
    assert (cloud.bucket / "run" / "logs" / "worker-0.log").read_text() in log
    assert not cloud.calls("delete")
