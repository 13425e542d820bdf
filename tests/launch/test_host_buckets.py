"""host.sh: buckets that are mounted, that die, that hang, and workdirs in none."""

import os
import re
import signal
from pathlib import Path

from tests.launch.cloud import dead_mounts, hanging_mounts
from tests.launch.host import Host, lives


def test_a_bucket_that_cannot_be_mounted_or_written_is_one_line(host: Host):
    host.pack()
    host.do("unpack")
    status, output = host.do("setup", "tpu", f"nowhere:{host.cloud.mounts}/nowhere")
    assert status == 1
    assert "gs://nowhere cannot be mounted: does it exist, and may" in output
    host.cloud.script("host-bin/mktemp", "echo \"mktemp: '$1': Permission denied\" >&2; exit 1")
    status, output = host.do("setup", "tpu", f"bucket:{host.cloud.bucket}")
    assert status == 1
    assert "gs://bucket cannot be written (Permission denied): give this machine's" in output
    assert not (host.state / "ready").exists()


def test_unprepared_data_in_a_bucket_is_refused(host: Host):
    """All hosts would prepare it at once, into one folder."""
    host.ready().cloud.trainer("exit 0")
    mount, data = f"bucket:{host.cloud.bucket}", host.cloud.bucket / "data"
    words = ["run", mount, "--", "--workdir=x", f"--config.data.data_dir={data}"]
    status, output = host.do(*words)
    assert status == 2  # which no second try mends, other than what follows
    assert f"{data} is empty: prepare the data once and copy it there" in output
    assert not (host.state / "run").exists()
    assert host.do("status", "x")[1] == "worker=0 state=exited exit=2 step=0\n"
    host.cloud.script("host-bin/ls", "echo 'ls: Input/output error' >&2; exit 2")
    status, output = host.do(*words)
    assert (status, "cannot be listed: ls: Input/output error" in output) == (1, True)
    (host.cloud.root / "host-bin" / "ls").unlink()
    (data / "fashion_mnist").mkdir(parents=True)
    assert host.do(*words)[0] == 0
    host.ended()
    # Another bucket whose name only begins alike is not this one's to check.
    words[-1] = f"--config.data.data_dir={host.cloud.bucket}-data/a"
    assert host.do(*words)[0] == 0


def test_a_dead_mount_is_called_that_and_mounted_anew(host: Host):
    """As the kernel leaves it when gcsfuse has ended: there, and no file in it."""
    host.ready().cloud.trainer("exit 0")
    mount, workdir = f"bucket:{host.cloud.bucket}", f"{host.cloud.bucket}/run"
    words = ["run", mount, "--", f"--workdir={workdir}"]
    assert host.do(*words)[0] == 0
    host.ended()
    dead_mounts(host.cloud)
    (host.home / "dead").touch()
    assert host.do("status", workdir)[1] == "worker=0 state=exited exit=0 step=0 mount=dead\n"
    assert host.do("status", "runs/a")[1] == "worker=0 state=ready exit=- step=0\n"
    status, output = host.do(*words)
    assert status == 0, output
    assert "the mount of gs://bucket is dead, for its gcsfuse has ended: mounting it anew" in output
    assert (host.home / "mounted").read_text() == f"{host.cloud.bucket}\n"
    host.ended()
    assert host.do("status", workdir)[1] == "worker=0 state=exited exit=0 step=0\n"
    (host.home / "dead").touch()
    for name in ("fusermount", "umount"):
        host.cloud.script(f"host-bin/{name}", "exit 1")
    status, output = host.do(*words)
    assert status == 1
    assert output.splitlines()[-1] == (
        f"worker 0: the dead mount at {host.cloud.bucket} cannot be removed: "
        f"umount -l {host.cloud.bucket}"
    )


def test_a_mount_that_hangs_holds_up_nothing(host: Host):
    """Neither a look, nor a start, nor the note of how a run ended."""
    host.environment["SYNC_JAX_HOST_LIMIT"] = "3"
    host.ready().cloud.trainer(
        'echo begun; until [ -e "$HOME/hangs" ]; do sleep 0.02; done; exit 9'
    )
    hanging_mounts(host.cloud)
    mount, workdir = f"bucket:{host.cloud.bucket}", f"{host.cloud.bucket}/run"
    (host.cloud.bucket / "run" / "checkpoints" / "7").mkdir(parents=True)
    words = ["run", mount, "--", f"--workdir={workdir}"]
    assert host.do(*words)[0] == 0
    assert host.do("status", workdir)[1] == "worker=0 state=running exit=- step=7\n"
    (host.home / "hangs").touch()
    assert host.ended() == 9
    assert host.do("status", workdir)[1] == "worker=0 state=exited exit=9 step=0 mount=hangs\n"
    status, output = host.do(*words)
    assert status == 1
    assert f"gs://bucket, mounted at {host.cloud.bucket}, does not answer within 3 s" in output


GCSFUSE = """
while [ $# -gt 2 ]; do shift; done
echo "$2" >>"$HOME/mounted"
unmount() { # what is in use stays; what is not is no longer there
  found=$(find /proc/[0-9]*/fd -lname "$2*" 2>/dev/null)
  if [ -z "$found" ]; then mv "$2" "$2-gone"; exit; fi
  touch "$HOME/in-use"
}
(trap 'unmount "$@"' TERM; while :; do sleep 0.02; done) >/dev/null 2>&1 &
echo $! >"$HOME/gcsfuse"
"""


def test_the_bucket_stays_until_the_run_has_saved(host: Host):
    """A shutdown's TERM reaches gcsfuse too, which then unmounts what nobody uses."""
    bucket = host.cloud.bucket
    host.cloud.script("host-bin/gcsfuse", GCSFUSE)
    host.ready().cloud.trainer(
        "ended() { until [ -e $HOME/in-use ]; do sleep 0.02; done; save 7; exit 75; }\n"
        "trap ended TERM\necho begun\nwhile :; do sleep 0.02; done"
    )
    status, output = host.do("run", f"bucket:{bucket}", "--", f"--workdir={bucket}/run")
    assert status == 0, output
    host.cloud.wait(lambda: "begun" in (host.state / "log").read_text())
    gcsfuse = int((host.home / "gcsfuse").read_text())
    os.kill(gcsfuse, signal.SIGTERM)
    parent = host.signal(signal.SIGTERM)
    assert host.ended() == 75
    assert (bucket / "run" / "checkpoints" / "7").is_dir()
    (log,) = (bucket / "run" / "logs").iterdir()
    assert re.fullmatch(r"worker-0-\d{8}T\d{6}Z\.log", log.name)
    assert "ended with exit status 75" in log.read_text()
    gone = bucket.with_name("bucket-gone")
    assert not gone.exists()
    host.cloud.wait(lambda: not Path(f"/proc/{parent}").exists())
    os.kill(gcsfuse, signal.SIGTERM)  # now it may
    host.cloud.wait((gone / "run").exists)


def test_the_mount_outlives_a_setup_that_is_ended(host: Host):
    """stop knows by its environment what a setup has started; gcsfuse has another."""
    host.cloud.script("host-bin/gcsfuse", GCSFUSE)
    host.pack()
    host.do("unpack")
    (host.cloud.root / "pip-hangs").touch()
    child = host.start("setup", "tpu", f"bucket:{host.cloud.bucket}")
    host.cloud.wait(lambda: bool((host.cloud.root / "pip-hangs").read_text()))
    assert host.do("stop", "120")[0] == 0
    child.communicate(timeout=1000)
    assert lives(int((host.home / "gcsfuse").read_text()))


NETWORK = '''if [ "$1 $2 $3" = "-f -c %T" ] && [ -e "$4" ]; then
  case $4 in
    */nfs*) echo nfs; exit ;;
    */unknown*) echo "UNKNOWN (0x1)"; exit ;;
    */disk) echo xfs; exit ;;
  esac
fi
exec /usr/bin/stat "$@"'''


def test_a_workdir_that_would_go_with_the_machine_is_refused(host: Host):
    host.cloud.script("host-bin/stat", NETWORK)
    host.ready().cloud.trainer("exit 0")
    for name in ("nfs", "unknown", "disk"):
        (host.home / name).mkdir()
    local = f"{host.home}/disk/runs/a"
    status, output = host.do("run", "lasting", "--", f"--workdir={local}")
    assert status == 2
    message = f"worker 0: --workdir={local} lies on this host's own disk (xfs), which no other host"
    assert output.startswith(message)
    assert host.do("status", local)[1] == "worker=0 state=exited exit=2 step=0\n"
    assert message[10:] in (host.state / "log").read_text()
    assert not (host.state / "run").exists()
    for words in (
        ["run", "--", f"--workdir={local}"],
        ["run", "lasting", "--", f"--workdir={host.home}/nfs/runs/a"],
        ["run", "lasting", "--", f"--workdir={host.home}/unknown"],
    ):
        status, output = host.do(*words)
        assert status == 0, output
        host.ended()
        assert host.do("stop", "120")[0] == 0
