"""sky.yaml: SkyPilot reads it, and what it runs is the trainer with the options that it needs."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.launch.cloud import REPOSITORY

TEXT = (REPOSITORY / "launch" / "sky.yaml").read_text()
TASK = yaml.safe_load(TEXT)

# As `sky jobs launch` reads a file. In a process of its own, for it sets up logging and a database.
READ = """
import json, sys
from sky.utils import dag_utils
found = []
for path in sys.argv[1:]:
    try:
        env = [("BUCKET", "my-bucket"), ("CONFIG", "c"), ("RUN", "r")]
        (task,) = dag_utils.load_chain_dag_from_yaml(path, env_overrides=env).tasks
        (resources,) = task.resources
        storage = {k: [v.source, v.mode.value] for k, v in task.storage_mounts.items()}
        task.set_resources_override({"accelerators": "H100:8"})  # as --gpus does
        (overridden,) = task.resources
        found.append([task.num_nodes, resources.to_yaml_config(), storage, str(overridden)])
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""


def test_skypilot_reads_it(tmp_path):
    """And nothing that it does not understand."""
    paths = [tmp_path / "good.yaml", tmp_path / "bad.yaml"]
    for path, text in zip(paths, (TEXT, TEXT.replace("use_spot", "use_spto")), strict=True):
        path.write_text(text)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    environment["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
    command = [sys.executable, "-c", READ, *paths]
    result = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    good, bad = json.loads(result.stdout.splitlines()[-1])
    nodes, resources, storage, overridden = good
    assert nodes == 1
    assert resources["accelerators"] == {"tpu-v5litepod-8": 1}
    assert resources["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite"}
    assert resources["use_spot"] is True
    recovery = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    assert resources["job_recovery"].items() >= recovery.items()
    assert storage == {"/mnt/sync_jax": ["gs://my-bucket", "MOUNT"]}
    assert "H100" in overridden
    assert re.match(r"\w+Error: .*use_spto", bad, re.S)


def meet(rank: int) -> list[str]:
    return ["--coordinator=10.0.0.3:8476", "--processes=2", f"--process={rank}"]


# The hosts of a TPU slice count as nodes here, and JAX knows of them by itself.
@pytest.mark.parametrize(
    ("nodes", "gpus", "rank", "options"),
    [(1, 8, 0, []), (2, 8, 0, meet(0)), (2, 8, 1, meet(1)), (2, 0, 1, [])],
)
def test_nodes_with_gpus_meet_and_hosts_of_a_slice_are_left_to_jax(
    nodes, gpus, rank, options, tmp_path
):
    """As SkyPilot runs both scripts: by bash, in the copy of the checkout."""
    extra = "cuda" if gpus else "tpu"
    programs = {
        ".venv/bin/python": 'printf "%s\\0" "$JAX_PLATFORMS" "$@" >argv\nexit 75',
        "launch/venv.sh": 'echo "$PYTHON $1" >installed',
        "home/.local/bin/uv": 'case $2 in find) echo "/opt/python$4" ;; esac',
        "bin/nvidia-smi": f"[ {gpus} -gt 0 ]",
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {
        **{"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path / "home")},
        **{"BUCKET": "b", "CONFIG": "configs/cifar10.py", "RUN": "a run"},
        "ARGS": "--config.seed=1 --config.x='a b' --config.data.data_dir=/home/me",
        "SKYPILOT_NODE_IPS": "10.0.0.3\n10.0.0.7",
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
    }
    for script, status in {"setup": 0, "run": 75}.items():
        command = ["bash", "-c", TASK[script]]
        result = subprocess.run(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        assert result.returncode == status
    own = "warning: --config.data.data_dir=/home/me is on this machine's disk, and lost with it\n"
    assert result.stdout == own
    assert (tmp_path / "installed").read_text() == f"/opt/python3.11 {extra}\n"
    assert (tmp_path / "argv").read_text().split("\0")[:-1] == [
        *(f"{extra},cpu", "-u", "-m", "sync_jax.main", "--config=configs/cifar10.py"),
        *("--workdir=/mnt/sync_jax/a run", "--config.seed=1", "--config.x=a b"),
        *("--config.data.data_dir=/home/me", *options),
    ]
