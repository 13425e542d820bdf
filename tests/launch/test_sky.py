"""sky.yaml: of the form that SkyPilot documents; what it runs is ours and right."""

import subprocess

import yaml

from tests.launch.cloud import REPOSITORY

TASK = yaml.safe_load((REPOSITORY / "launch" / "sky.yaml").read_text())


def test_the_fields_are_skypilots():
    """Its own parser (0.14.1) accepted the file; this notices a misspelling since."""
    assert set(TASK) == {"name", "workdir", "resources", "envs", "file_mounts", "setup", "run"}
    assert TASK["resources"] == {
        "infra": "gcp",
        "accelerators": "tpu-v5litepod-8",
        "accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite"},
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]},
    }
    assert TASK["file_mounts"] == {"/mnt/sync_jax": {"source": "gs://${BUCKET}", "mode": "MOUNT"}}


def test_its_scripts_set_up_and_start_the_trainer(tmp_path):
    """As SkyPilot runs them: by bash, in a home with the checkout at sky_workdir."""
    checkout = tmp_path / "sky_workdir"
    (checkout / "launch").mkdir(parents=True)
    (checkout / "launch" / "host.sh").write_text('echo "$@" >"$HOME/setup"')
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$JAX_PLATFORMS" "$@" >"$HOME/argv"\nexit 75\n')
    python.chmod(0o755)
    environment = {
        **{"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "EXTRA": "tpu", "BUCKET": "b"},
        **{"CONFIG": "configs/cifar10.py", "RUN": "a", "ARGS": "--config.seed=1 --config.x='a b'"},
    }
    status = []
    for script in ("setup", "run"):
        result = subprocess.run(["bash", "-c", TASK[script]], env=environment, cwd=tmp_path)
        status.append(result.returncode)
    assert status == [0, 75]
    assert (tmp_path / "setup").read_text() == "setup tpu\n"
    assert (tmp_path / "argv").read_text().splitlines() == [
        *("tpu,cpu", "-u", "-m", "sync_jax.main", "--config=configs/cifar10.py"),
        *("--workdir=/mnt/sync_jax/a", "--config.seed=1", "--config.x=a b"),
    ]
