"""Processes meet, agree, fail and end together: real ones, without a network."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import pytest

from sync_jax.errors import InputError
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.processes import initialize
from sync_jax.steps import TrainState
from tests import processes

MEETING = """
import sys
from sync_jax import errors
from sync_jax.runtime import processes as distributed

def meet(seconds=60.0):
    i, port, count = map(int, sys.argv[1:4])
    distributed.initialize(f"localhost:{port}", count, i, seconds=seconds)
"""


def start(script: str, indices: range, port: int, *more: object, count: int = 2, **options):
    """Starts some of `count` processes, each with its index, the port and the count."""
    program = [sys.executable, "-c", MEETING + script]
    return [
        processes.start([[*program, *map(str, (i, port, count, *more))]], **options)[0]
        for i in indices
    ]


AGREEING = """
import time
distributed.initialize(None, None, None, seconds=60)
processes = distributed.Processes(seconds=60)
print(processes.share("a", {"i": processes.index}))

def fails():
    if processes.index == 1:
        raise errors.InputError("no such file")
    return "fine"

for function in (processes.together, processes.from_first):
    try:
        print(function("b", fails))
    except errors.InputError as error:
        print("InputError", error)
print(processes.from_first("c", lambda: [processes.index, "first"]))
distributed.Processes(seconds=1).from_first("the data", lambda: time.sleep(4))
if processes.first:
    try:
        distributed.Processes(seconds=1).share("the end")
    except errors.FailedError as error:
        print("FailedError", error)
"""


@pytest.mark.slow
def test_processes_agree_and_name_those_that_are_missing():
    """Under Slurm, whose srun tells each process this; JAX makes a port of the job's number."""
    slurm = {"JOB_ID": os.getpid() % 4096, "STEP_NODELIST": "localhost", "NTASKS": 2}
    children = []
    for i in range(2):
        settings = slurm | {"PROCID": i, "LOCALID": i}
        variables = {f"SLURM_{name}": str(value) for name, value in settings.items()}
        children += start(AGREEING, range(i, i + 1), 0, **variables)
    first, second = processes.finish(children)
    assert [child.returncode for child in children] == [0, 0], (first, second)
    shared = "[{'i': 0}, {'i': 1}]"
    assert first.splitlines() == [
        shared,
        "InputError process 1: no such file",
        "fine",
        "[0, 'first']",
        "FailedError process 1 of 2 did not come to 'the end' within 1 s; its own log says why",
    ]
    lines = second.splitlines()
    assert lines[:4] == [shared, "InputError no such file", "fine", "[0, 'first']"]
    assert set(lines[4:]) == {"process 1 still waits for process 0: the data"}


COMING = """
try:
    meet(3.0)
except errors.FailedError as error:
    print("FailedError", error)
"""


@pytest.mark.slow
def test_processes_that_never_come_end_the_others_with_a_line():
    """Also where it is the one that the others meet at. JAX would abort them with a C++ stack."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ports = [processes.free_port(), processes.free_port(), taken.getsockname()[1]]
        first, second, refused = (
            start(COMING, range(i, i + 1), port)[0]
            for i, port in zip((0, 1, 0), ports, strict=True)
        )
        printed = processes.finish([first, second, refused])
    for port, text in zip(ports, printed[:2], strict=False):
        assert text == (
            f"sync_jax: not all 2 processes came to the meeting at localhost:{port} within 3 s; "
            "the log of the one that is missing says why\n"
        )
    assert [child.returncode for child in (first, second, refused)] == [1, 1, 0]
    where = f"FailedError the other processes cannot be met at localhost:{ports[2]}: "
    assert printed[2] == f"{where}Address already in use\n"


WAITING = """
from sync_jax.runtime import signals

with signals.ending_at_sigterm():
    if sys.argv[3] == "1":
        print("waiting", flush=True)
        sys.argv[3] = "2"
    meet(1000.0)
    with signals.ending_at_sigterm(distributed.outlast_others):
        processes = distributed.Processes(seconds=1000)
        print("waiting", flush=True)
        processes.from_first("it", lambda: sys.stdin.read())
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_ends_what_waits_for_other_processes(count):
    """For one that never comes to meet, or for what the first is busy with."""
    children = start(
        WAITING, range(count), processes.free_port(), count=count, stdin=subprocess.PIPE
    )
    for child in children:
        assert child.stdout.readline() == "waiting\n"
    for child in children:
        child.send_signal(signal.SIGTERM)
        if child is not children[-1]:  # to several hosts it comes one after the other
            time.sleep(3)
    printed = processes.finish(children, timeout=400)  # and not 1000
    assert [child.returncode for child in children] == [75] * count, printed
    assert "stopped by SIGTERM" in printed[0]


FAILING = """
import jax, numpy as np
from sync_jax.runtime import sharding

meet()
mesh = sharding.make_mesh()
total = jax.jit(lambda x: x.sum(), out_shardings=sharding.replicated(mesh))
try:
    with distributed.Processes(seconds=60).ending_together():
        for step in range(3):
            if (step, sys.argv[1]) == (1, sys.argv[4]):
                raise errors.InputError("no such picture")
            print(float(total(sharding.from_shares(np.ones(1), mesh))), flush=True)
except errors.InputError as error:
    print("InputError", error)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_process_alone_ends_the_others(failing):
    """Though they are in a collective that waits for it."""
    children = start(FAILING, range(2), processes.free_port(), failing)
    printed = [text.splitlines()[1:] for text in processes.finish(children)]  # Gloo's line
    assert printed[failing] == ["2.0", "InputError no such picture"]
    assert printed[1 - failing] == ["2.0", f"sync_jax: process {failing} failed: no such picture"]
    assert [child.returncode for child in children] == [2, 2]


RESTORING = """
import errno, os
from pathlib import Path
import jax, numpy as np
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.steps import TrainState

meet()
mesh, processes = sharding.make_mesh(), distributed.Processes(seconds=60)
folder = Path(sys.argv[4])
one = np.arange(1.0, 5.0, dtype=np.float32)
part = one[2 * processes.index :][:2]

def copied(x):
    return jax.make_array_from_process_local_data(sharding.replicated(mesh), x)

def state(step):
    divided = sharding.from_shares(part * step, mesh)
    return TrainState(copied(np.int32(step)), copied(one * step), {}, {}, divided)

def opened():
    return Checkpoints(folder, keep=9, processes=processes)

with opened() as checkpoints:
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(state(step), step)
read = Checkpoints._read

def reads(self, like, step):  # what only process 1 meets
    found, about = read(self, like, step)
    if processes.index == 1 and step == 5:
        raise ValueError("torn")
    if processes.index == 1 and step == 4:
        found = found.replace(params=copied(one * 4 + 1))
    if step == 3:
        found = found.replace(memory=sharding.from_shares(part * 3 + processes.index, mesh))
    if processes.index == 1 and step == failing:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return found, about

Checkpoints._read, failing = reads, 0
with opened() as checkpoints:
    restored = checkpoints.restore(state(0), processes.print)
    print(restored.step, restored.state.params.addressable_data(0))
failing = 2
with opened() as checkpoints:
    try:
        checkpoints.restore(state(0))
    except errors.FailedError as error:
        print("FailedError", error)
"""


@pytest.mark.slow
def test_damage_that_one_process_meets_is_met_by_all(tmp_path):
    """In its part of the arrays; and what they saved fits other devices."""
    children = start(RESTORING, range(2), processes.free_port(), tmp_path)
    printed = processes.finish(children)
    assert [child.returncode for child in children] == [0, 0], printed
    lines = [[x for x in text.splitlines() if "[Gloo]" not in x] for text in printed]
    reasons = {5: "torn", 4: ".params is not what was saved", 3: ".memory is not what was saved"}
    assert lines[0][:-2] == [
        f"checkpoint {tmp_path}/{step} is put aside as {step}.damaged: {reason}"
        for step, reason in reasons.items()
    ]
    error = f"{tmp_path}/2 cannot be read now: [Errno 5] Input/output error; the same command"
    found = ["2 [2. 4. 6. 8.]", f"FailedError {error} tries again"]
    assert lines[0][-2:] == lines[1] == found
    mesh = sharding.make_mesh(jax.devices()[:4])
    divided = jax.device_put(jnp.zeros(4), sharding.batch_sharding(mesh))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        restored = checkpoints.restore(TrainState(jnp.int32(0), divided, {}, {}, divided))
    assert restored.step == 2
    chex.assert_trees_all_equal(restored.state.memory, jnp.arange(2.0, 10.0, 2.0))


APART = """
from pathlib import Path
from configs import quickstart
from sync_jax import sweep, train
from sync_jax.runtime import workdir

meet()
config, folder = quickstart.get_config(), Path(sys.argv[4 + int(sys.argv[1])])
workdir._VISIBLE_WITHIN = 1.0
for begin in (
    lambda: train.train_and_evaluate(config, folder),
    lambda: sweep.sweep(config, ["seed=0,1"], folder, name="x"),
):
    try:
        begin()
    except errors.InputError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_workdir_that_is_not_one_folder_ends_all_before_the_data_are_read(tmp_path):
    """The folder may be there before or not; nothing is left in it."""
    own = [tmp_path / "first" / "run", tmp_path / "second" / "run"]
    own[1].mkdir(parents=True)
    children = start(APART, range(2), processes.free_port(), *own)
    printed = processes.finish(children)
    assert [child.returncode for child in children] == [0, 0], printed
    host = socket.gethostname()
    for folder, text in zip(own, printed, strict=True):
        assert [x for x in text.splitlines() if "[Gloo]" not in x] == 2 * [
            f"--workdir={folder} is not one folder for all processes: process 1 on {host} cannot "
            f"see what process 0 on {host} writes there; name a folder that all share"
        ]
    assert set(tmp_path.rglob("*")) == {own[1].parent, own[1]}


def test_incomplete_arguments_are_refused():
    bad = {
        ("localhost:1", 2, None): "--coordinator, --processes and --process belong together",
        ("localhost:1", 2, 2): "--process=2 must be between 0 and --processes=2 - 1",
    }
    for address in ("localhost", "localhost:" + "9" * 5000, "localhost:99999"):
        bad[address, 2, 0] = f"--coordinator={address} must be HOST:PORT, a port from 1 to 65535"
    for arguments, message in bad.items():
        with pytest.raises(InputError) as error:
            initialize(*arguments, seconds=1)
        assert str(error.value) == message


def test_on_a_tpu_the_others_are_found_by_jax(monkeypatch):
    """On a slice; a host with chips of its own is alone, as every other machine is."""
    calls, find_spec = [], importlib.util.find_spec

    def joined(*given, cluster_detection_method, **_):
        calls.append((*given, cluster_detection_method))
        if len(calls) > 1:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    monkeypatch.setattr(jax.distributed, "initialize", joined)
    initialize(None, None, None, seconds=60)
    assert calls == []
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    found = lambda name: name == "libtpu" or find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    for _ in range(2):
        initialize(None, None, None, seconds=60)
    assert calls == [(None, None, None, None)] * 2
