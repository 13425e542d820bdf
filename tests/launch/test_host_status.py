"""host.sh status: how a run stands, and which run that is."""

import pytest

from tests.launch.cloud import REPOSITORY
from tests.launch.host import PATIENT, Host


@pytest.mark.parametrize(
    ("earlier", "look"),
    [("none", 1), ("runs/a", 1), ("runs/a", 2), ("runs/b", 1), ("runs/b", 2)],
)
def test_a_run_that_starts_while_status_looks_is_that_run(earlier, look, host: Host):
    """Not lost, nor another's: what was noted of an earlier one does not count."""
    host.ready().cloud.trainer("exit 0")
    if earlier != "none":
        assert host.do("run", "--", f"--workdir={earlier}")[0] == 0
        host.ended()
        assert host.do("stop", "120")[0] == 0  # waits until no process of it is left
    host.cloud.trainer(PATIENT)
    looks = host.home / "looks"
    # Processes are looked for by grep; what the start itself looks for does not count.
    host.cloud.script(
        "host-bin/grep",
        f"""if [ -n "$COUNTED" ]; then
  echo >>{looks}
  if [ $(wc -l <{looks}) = {look} ]; then
    env -u COUNTED bash {REPOSITORY}/launch/host.sh run -- --workdir=runs/a >/dev/null
  fi
fi
exec /usr/bin/grep "$@" """,
    )
    host.environment["COUNTED"] = "1"
    assert host.do("status", "runs/a") == (0, "worker=0 state=running exit=- step=0\n")
    assert len(looks.read_text()) > look


def test_how_a_run_ended_is_told_of_its_workdir_only(host: Host):
    host.ready().cloud.trainer("exit 0")
    assert host.do("run", "--", "--workdir=runs/a")[0] == 0
    host.ended()
    host.cloud.wait(lambda: "exited" in host.do("status")[1])
    assert host.do("status", "runs/a")[1] == "worker=0 state=exited exit=0 step=0\n"
    assert host.do("status", "runs/b")[1] == "worker=0 state=ready exit=- step=0\n"
    assert host.do("stop", "120")[0] == 0  # until no process of it is left
    (host.state / "exit").unlink()
    assert host.do("status", "runs/a")[1] == "worker=0 state=lost exit=- step=0\n"
    assert host.do("status", "runs/b")[1] == "worker=0 state=ready exit=- step=0\n"


def test_the_steps_of_a_sweep_are_those_of_its_runs(host: Host):
    host.ready()
    sweep = host.home / "sync_jax" / "runs" / "my sweep"
    for name in ("a-0/checkpoints/5", "a-0/checkpoints/20", "a-1/checkpoints/3", "compare"):
        (sweep / name).mkdir(parents=True)
    (sweep / "a-1" / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert host.do("status", "runs/my sweep")[1] == "worker=0 state=ready exit=- step=23\n"
