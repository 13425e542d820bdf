"""The same training curve on one device, on eight, and on two processes of two devices each."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from jax._src import distributed as jax_distributed

from sync_jax import train
from sync_jax.data import registry
from sync_jax.data.loading import load_data
from sync_jax.errors import InputError
from sync_jax.runtime import roll_call as roll_call_lib
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.processes import Processes, initialize
from sync_jax.runtime.progress import Progress
from sync_jax.runtime.roll_call import roll_call
from sync_jax.sweep import sweep
from sync_jax.trainer import Run
from tests import processes, tiny
from tests.curves import check_close

METHODS = ["ce", "selectivenet", "sync", "self_adaptive"]
MAKE_MESH = sharding.make_mesh


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


def use(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    mesh = MAKE_MESH(jax.devices()[:devices])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)


def cut_short(finished: Path, copy: Path) -> None:
    """The run as it was after its first checkpoint."""
    shutil.copytree(finished, copy)
    (copy / "report.json").unlink()
    for step in ("12", "18"):
        shutil.rmtree(copy / "checkpoints" / step)


@pytest.mark.slow
def test_one_device_eight_and_two_processes_train_alike(data_dir, tmp_path, monkeypatch, capsys):
    """With BatchNorm, batches that straddle epochs, and a last batch of 40 examples by 16."""
    vary = f"--vary=method={','.join(METHODS)}"

    def train_all(devices: int) -> None:
        use(monkeypatch, devices)
        out = tmp_path / str(devices)
        assert sweep(tiny.config(data_dir), [vary.partition("=")[2]], out, name="quickstart")

    train_all(1)
    # What one device saved, two processes go on with, who divide the optimiser between them.
    name = "quickstart-selectivenet-seed0"
    cut_short(tmp_path / "1" / name, tmp_path / "two" / name)
    command = tiny.command(
        data_dir, tmp_path / "two", "--mode=sweep", vary, "--config.optimizer.sharded=True"
    )
    children = processes.start([command] * 2, devices=2, XLA_FLAGS=os.environ["XLA_FLAGS"])
    train_all(8)
    printed = processes.finish(children, timeout=1800)
    assert [child.returncode for child in children] == [0, 0], printed
    assert "resuming at step 6 of 18" in printed[0]
    described = printed[0].index("4 CPU devices of 2 processes")
    # Devices were connected before: in the first step, for which each compiles, Gloo waits 30 s.
    assert "[Gloo]" in printed[0][:described]
    assert "[Gloo]" not in printed[0][described:]
    for method in METHODS:
        name = f"quickstart-{method}-seed0"
        for other in ("8", "two"):
            check_close(tmp_path / "1" / name, tmp_path / other / name)
    # What two processes saved, one device goes on with.
    name = "quickstart-self_adaptive-seed0"
    moved = tmp_path / "moved"
    cut_short(tmp_path / "two" / name, moved)
    use(monkeypatch, 1)
    capsys.readouterr()
    config = tiny.config(data_dir, method="self_adaptive", optimizer__sharded=True)
    train.train_and_evaluate(config, moved)
    assert "resuming at step 6 of 18" in capsys.readouterr().out
    check_close(tmp_path / "1" / name, moved)
    # Negative control: another seed's curve is not close.
    name = "quickstart-ce-seed0"
    train.train_and_evaluate(tiny.config(data_dir, method="ce", seed=1), tmp_path / "seed1")
    with pytest.raises(AssertionError):
        check_close(tmp_path / "1" / name, tmp_path / "seed1")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_another_topology_goes_on_at_the_right_data(
    before, after, data_dir, tmp_path, monkeypatch, capsys
):
    """Eight devices divide the optimiser's state between them; a checkpoint of it fits one."""

    def config(devices: int):
        return tiny.config(data_dir, method="self_adaptive", optimizer__sharded=devices > 1)

    use(monkeypatch, 1)
    train.train_and_evaluate(config(1), tmp_path / "whole")
    step = Progress.step

    def stop_at_eight(self, done):
        if done == 8:
            raise KeyboardInterrupt
        step(self, done)

    use(monkeypatch, before)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop_at_eight)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config(before), tmp_path / "moved")
    use(monkeypatch, after)
    train.train_and_evaluate(config(after), tmp_path / "moved")
    assert "resuming at step 6 of 18" in capsys.readouterr().out
    check_close(tmp_path / "whole", tmp_path / "moved")


def test_a_sharded_optimiser_takes_a_part_of_the_memory_and_does_the_same(data_dir, tmp_path):
    states = []
    for sharded in (False, True):
        config = tiny.config(data_dir, method="ce", optimizer__sharded=sharded)
        run = Run(config, MAKE_MESH(), train_size=tiny.NUM_TRAIN - tiny.NUM_CALIBRATION)
        _, part, _ = load_data(
            config, registry.dataset(config.data), run.mesh, tmp_path, Processes()
        )
        state, _ = run.step(run.create_state(), next(run.feed(part, 0)))
        states.append(state)
    momentum = [max(jax.tree.leaves(state.opt_state), key=lambda x: x.size) for state in states]
    assert momentum[0].size > 1024
    rows = [x.addressable_shards[0].data.size for x in momentum]
    assert rows == [momentum[0].size, momentum[0].size // 8]
    copied, divided = (jax.device_get(state) for state in states)
    chex.assert_trees_all_close(copied, divided, rtol=1e-5, atol=1e-7)
    # And a checkpoint of the parts is one of the whole.
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(states[1], 1)
        checkpoints.wait()
        restored = checkpoints.restore(states[0]).state
    chex.assert_trees_all_equal(jax.device_get(restored), divided)


AGREEING = """
import sys, time
from sync_jax import errors
from sync_jax.runtime import processes as distributed

i, port = int(sys.argv[1]), sys.argv[2]
distributed.initialize(f"localhost:{port}", 2, i, seconds=60)
processes = distributed.Processes(seconds=60)
print(processes.share("a", {"i": i}))

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
distributed.Processes(seconds=1, name="slow").from_first("the data", lambda: time.sleep(6))
if processes.first:
    try:
        distributed.Processes(seconds=1, name="again").share("the end")
    except errors.FailedError as error:
        print("FailedError", error)
"""


@pytest.mark.slow
def test_processes_agree_and_name_those_that_are_missing():
    script = [sys.executable, "-c", AGREEING]
    port = processes.free_port()
    children = [processes.start([[*script, str(i), str(port)]])[0] for i in range(2)]
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
import sys
from sync_jax import errors
from sync_jax.runtime import processes as distributed

i, port, count = map(int, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()  # all begin at once, however long each took to start
try:
    distributed.initialize(f"localhost:{port}", count, i, seconds=4)
except errors.FailedError as error:
    print("FailedError", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("missing", [[0], [1], [1, 3]])
def test_processes_that_never_come_are_named_by_all_that_did(missing):
    """Also where it is the one that the others meet at."""
    port, count = processes.free_port(), 4 if len(missing) > 1 else 3
    children = [
        processes.start(
            [[sys.executable, "-c", COMING, str(i), str(port), str(count)]], stdin=subprocess.PIPE
        )[0]
        for i in range(count)
        if i not in missing
    ]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
    finally:
        printed = processes.finish(children)
    expected = (
        f"FailedError process {', '.join(map(str, missing))} of {count} did not come to the "
        f"meeting at localhost:{port} within 4 s; its own log says why\n"
    )
    assert printed == [expected] * len(children)


@pytest.mark.slow
def test_a_port_in_use_is_an_error():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        command = [sys.executable, "-c", COMING, "0", str(taken.getsockname()[1]), "2"]
        (printed,) = processes.finish(processes.start([command], stdin=subprocess.DEVNULL))
    assert printed.startswith("ready\nFailedError the other processes cannot be met at localhost:")
    assert "in use" in printed


WAITING = """
import sys
from sync_jax.runtime import processes as distributed
from sync_jax.runtime import signals as process

i, port, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with process.ending_at_sigterm():
    if count == 1:
        print("waiting", flush=True)
    distributed.initialize(f"localhost:{port}", 2, i, seconds=1000)
    with process.ending_at_sigterm(distributed.outlast_others):
        processes = distributed.Processes(seconds=1000)
        print("waiting", flush=True)
        processes.from_first("it", lambda: sys.stdin.read())
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_ends_what_waits_for_other_processes(count):
    """For one that never comes to meet, or for what the first is busy with."""
    port = processes.free_port()
    script = [sys.executable, "-c", WAITING]
    children = [
        processes.start([[*script, str(i), str(port), str(count)]], stdin=subprocess.PIPE)[0]
        for i in range(count)
    ]
    for child in children:
        assert child.stdout.readline() == "waiting\n"
    for child in children:
        child.send_signal(signal.SIGTERM)
        if child is not children[-1]:  # to several hosts it comes one after the other
            time.sleep(6)
    printed = processes.finish(children, timeout=400)  # and not 1000
    assert [child.returncode for child in children] == [75] * count, printed
    assert "stopped by SIGTERM" in printed[0]


FAILING = """
import sys
import jax, numpy as np
from sync_jax import errors
from sync_jax.runtime import processes as distributed
from sync_jax.runtime import sharding

i, port, failing = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
distributed.initialize(f"localhost:{port}", 2, i, seconds=60)
mesh = sharding.make_mesh()
total = jax.jit(lambda x: x.sum(), out_shardings=sharding.replicated(mesh))
try:
    with distributed.Processes(seconds=60).ending_together():
        for step in range(3):
            if (step, i) == (1, failing):
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
    script = [sys.executable, "-c", FAILING]
    port = processes.free_port()
    children = [processes.start([[*script, str(i), str(port), str(failing)]])[0] for i in range(2)]
    printed = [text.splitlines()[1:] for text in processes.finish(children)]  # Gloo's line
    assert printed[failing] == ["2.0", "InputError no such picture"]
    assert printed[1 - failing] == ["2.0", f"sync_jax: process {failing} failed: no such picture"]
    assert [child.returncode for child in children] == [2, 2]


UNDER_SLURM = """
from sync_jax.runtime import processes as distributed

distributed.initialize(None, None, None, seconds=60)
processes = distributed.Processes(seconds=60)
print(processes.share("who", processes.index), processes.count)
"""


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) != 0


@pytest.mark.slow
def test_under_slurm_processes_find_each_other_by_themselves():
    """What srun tells each task; JAX makes a port of the job's number."""
    job = next(number for number in range(os.getpid() % 4000, 4096) if is_free(61440 + number))
    children = [
        processes.start(
            [[sys.executable, "-c", UNDER_SLURM]],
            SLURM_JOB_ID=str(job),
            SLURM_STEP_NODELIST="localhost",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(i),
            SLURM_LOCALID=str(i),
        )[0]
        for i in range(2)
    ]
    assert processes.finish(children) == ["[0, 1] 2\n", "[0, 1] 2\n"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 2, None), "--coordinator, --processes and --process belong together"),
        (("localhost:1", 2, 2), "--process=2 must be between 0 and --processes=2 - 1"),
        (
            ("localhost", 2, 0),
            "--coordinator=localhost must be HOST:PORT, a port from 1 to 65535",
        ),
        (
            ("localhost:" + "9" * 5000, 2, 0),
            "--coordinator=localhost:" + "9" * 5000 + " must be HOST:PORT, a port from 1 to 65535",
        ),
        (
            ("localhost:99999", 2, 0),
            "--coordinator=localhost:99999 must be HOST:PORT, a port from 1 to 65535",
        ),
    ],
)
def test_incomplete_arguments_are_refused(arguments, message):
    with pytest.raises(InputError) as error:
        initialize(*arguments, seconds=1)
    assert str(error.value) == message


def test_on_a_tpu_the_others_are_found_by_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "libtpu" or find_spec(name)
    )
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    port = processes.free_port()
    calls = []

    class Slice(jax_distributed.clusters.ClusterEnv):  # JAX asks all such classes
        here = True
        is_env_present = classmethod(lambda cls: cls.here)
        get_coordinator_address = classmethod(lambda cls, **_: f"localhost:{port}")
        get_process_count = classmethod(lambda cls: 2)
        get_process_id = classmethod(lambda cls: 0)

    monkeypatch.setattr(jax_distributed.clusters.ClusterEnv, "_cluster_types", [Slice])
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    with ThreadPoolExecutor() as pool:
        other = pool.submit(roll_call, f"localhost:{port}", 2, 1, seconds=60)
        initialize(None, None, None, seconds=60)
        assert other.result() == []
    assert calls == [(f"localhost:{port}", 2, 0, None)]
    Slice.here = False
    initialize(None, None, None, seconds=9)  # a host with a chip of its own
    assert len(calls) == 1


def test_whoever_reached_process_0_waits_for_its_word_though_it_began_later(monkeypatch):
    """And one that came and ended is as missing as one that never came."""
    monkeypatch.setattr(roll_call_lib, "_GRACE", 2.0)
    port = processes.free_port()
    with ThreadPoolExecutor() as pool:
        second = pool.submit(roll_call, f"localhost:{port}", 4, 1, seconds=8)
        time.sleep(5)  # its own time, and the grace, would be over 3 s before the other's
        first = pool.submit(roll_call, f"localhost:{port}", 4, 0, seconds=8)
        connect(port, b"3\n").close()
        assert [call.result() for call in (first, second)] == [[2, 3], [2, 3]]


def connect(port: int, words: bytes) -> socket.socket:
    """A connection to process 0, as soon as it listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            connection = socket.create_connection(("localhost", port))
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
    connection.sendall(words)
    return connection


def test_a_host_without_address_is_said_to_be_one(monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(socket.gaierror):
        roll_call("no.such.host.invalid:1234", 2, 1, seconds=0.5)


def test_a_roll_call_survives_strangers_and_processes_that_begin_anew():
    port = processes.free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(roll_call, f"localhost:{port}", 3, 0, seconds=60)
        for words in (b"GET / HTTP/1.1\r\n", b"", b"7\n", b"2\n", b"2\n"):
            connect(port, words).close()
        others = [pool.submit(roll_call, f"localhost:{port}", 3, i, seconds=60) for i in (1, 2)]
        assert [call.result() for call in (first, *others)] == [[], [], []]


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    initialize(None, None, None, seconds=1)
    assert jax.process_count() == 1
    assert json.dumps(jax.process_index()) == "0"
    assert jnp.zeros(1).sum() == 0
