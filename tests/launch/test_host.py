"""host.sh: code and packages arrive whole, or nothing runs; secrets go; the help."""

from tests.launch.cloud import REPOSITORY
from tests.launch.host import Host


def test_setup_brings_a_python_and_says_ready_last(host: Host):
    host.pack()
    host.do("unpack")
    (host.cloud.root / "pip-fails").touch()
    status, output = host.do("setup", "tpu")
    assert status == 1
    assert "the packages cannot be installed" in output
    assert not (host.state / "ready").exists()
    status, output = host.do("run", "--", "--workdir=runs/a")
    assert status == 1
    assert "not set up, or not for this code" in output
    status, output = host.do("setup", "tpu")
    assert (status, output.splitlines()[-1]) == (0, "worker 0: ready")
    # The versions of constraints.txt, with what a TPU needs.
    for line in (host.home / "installed").read_text().splitlines():
        assert line.endswith("-c constraints.txt -e .[tpu]")
    assert (host.state / "uv" / "bin" / "uv").exists()


def test_newer_requirements_want_setup_again_and_newer_code_does_not(host: Host):
    host.ready()
    host.cloud.trainer("exit 0")
    host.pack("README.md")
    host.do("unpack")
    assert host.do("run", "--", "--workdir=runs/a")[0] == 0
    host.ended()
    (host.home / "sync_jax" / "constraints.txt").write_text("numpy==1\n")
    assert host.do("run", "--", "--workdir=runs/a")[0] == 1


def test_push_removes_what_was_pushed_and_nothing_else(host: Host):
    host.pack("README.md", "sync_jax/main.py")
    host.do("unpack")
    run = host.home / "sync_jax" / "runs" / "a" / "report.json"
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    host.pack("README.md")
    host.do("unpack")
    assert run.exists()
    assert (host.home / "sync_jax" / "README.md").exists()
    assert not (host.home / "sync_jax" / "sync_jax" / "main.py").exists()


def test_an_archive_that_was_cut_off_changes_nothing(host: Host):
    host.ready()
    code = host.home / "sync_jax" / "launch" / "host.sh"
    code.write_text("old")
    host.pack("README.md")
    archive = host.home / "sync_jax.tar.gz"
    whole = archive.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        archive.write_bytes(whole[:size])
        status, output = host.do("unpack")
        assert (status, "sync_jax.tar.gz is not whole: push it again" in output) == (1, True)
        assert code.read_text() == "old"
        assert not (host.home / "sync_jax" / "README.md").exists()
    archive.write_bytes(whole)
    assert host.do("unpack") == (0, "")
    assert code.read_text() == (REPOSITORY / "launch" / "host.sh").read_text()


def test_what_another_pushes_meanwhile_is_not_mixed_in(host: Host):
    host.ready().pack("README.md")
    host.cloud.script(
        "host-bin/tar",
        '/usr/bin/tar "$@" || exit\n'
        "case $* in *-tzf*) touch listed; until [ -e go ]; do sleep 0.02; done ;; esac",
    )
    child = host.start("unpack")
    host.cloud.wait((host.home / "listed").exists)
    host.pack("Makefile")  # as if it were another checkout's
    status, output = host.do("unpack")
    assert (status, "a run, or its setup, is going on here" in output) == (1, True)
    (host.home / "go").touch()
    child.communicate(timeout=1000)
    assert child.returncode == 0
    code = host.home / "sync_jax"
    assert [(code / name).exists() for name in ("README.md", "Makefile")] == [True, False]
    assert host.do("unpack") == (0, "")
    assert [(code / name).exists() for name in ("README.md", "Makefile")] == [False, True]


def test_code_of_two_versions_is_not_run(host: Host):
    """Unpacking was cut off, by a full disk or a power cut."""
    host.ready().pack("README.md")
    host.cloud.script("host-bin/tar", 'case $1 in -x*) exit 2 ;; esac\nexec /usr/bin/tar "$@"')
    assert host.do("unpack")[0] == 2
    for words in (["setup", "tpu"], ["run", "--", "--workdir=runs/a"]):
        status, output = host.do(*words)
        assert (status, "a part of what was pushed: push it again" in output) == (1, True), output
    (host.cloud.root / "host-bin" / "tar").unlink()
    assert host.do("unpack") == (0, "")
    assert host.do("setup", "tpu")[0] == 0


def test_host_sh_is_there_while_the_code_around_it_is_replaced(host: Host):
    """Whoever asks how a run stands calls it."""
    host.ready().pack("README.md")
    script = host.home / "sync_jax" / "launch" / "host.sh"
    script.write_text("old")
    seen = host.home / "seen"
    host.cloud.script(
        "host-bin/tar",
        f'/usr/bin/tar "$@" || exit\n'
        f'case $1 in -x*) cat {script}; stat -c " %i" {script} ;; esac >>{seen}',
    )
    before = script.stat().st_ino
    assert host.do("unpack") == (0, "")
    assert (host.home / "sync_jax" / "README.md").exists()
    assert seen.read_text() == f"old {before}\n" * 2
    assert script.read_text() == (REPOSITORY / "launch" / "host.sh").read_text()
    assert script.stat().st_mode & 0o111


def test_a_secret_goes_when_the_run_has_it(host: Host):
    host.ready().cloud.trainer('echo "${#SECRET} characters"')
    file = host.home / "sync_jax.env"
    file.write_text("SECRET= a 'b' $c \n")
    for _ in range(2):
        assert host.do("run", "--", "--workdir=runs/a")[0] == 0
        host.ended()
    assert not file.exists()
    assert not (host.state / "env").exists()
    log = (host.state / "log").read_text()
    assert [line for line in log.splitlines() if "=" not in line] == [
        "10 characters",
        "0 characters",
    ]
    # And where no run comes of it.
    (host.state / "ready").unlink()
    for words in (["run", "--", "--workdir=runs/a"], ["stop", "1"]):
        file.write_text("SECRET=a\n")
        assert host.do(*words)[0] == (words[0] == "run")
        assert not file.exists()


def test_the_help_lists_every_verb(host: Host):
    status, output = host.do("help")
    assert status == 2
    for verb in ("unpack", "setup", "run", "status", "logs", "stop", "unlock"):
        assert f"\n  {verb}" in output
