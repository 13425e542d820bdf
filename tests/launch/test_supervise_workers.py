"""supervise: a slice of three hosts, of which one fails, hangs or loses what it had."""

import re

from tests.launch.cloud import CONFIG, WORKDIR, Cloud, dead_mounts, hanging_mounts


def test_a_bucket_that_hangs_for_a_while_is_no_failure(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.environment["SYNC_JAX_HOST_LIMIT"] = "5"
    cloud.trainer(
        'save 5; if [ $FAKE_WORKER = 1 ]; then touch "$HOME/hangs"\n'
        'until [ -e "$HOME/looked" ]; do sleep 0.02; done; rm "$HOME/hangs"; fi'
    )
    hanging_mounts(cloud)
    result = cloud.supervise("--preemptions=0", "--failures=0")
    assert result.returncode == 0, result.stderr
    assert re.search(r"worker 1 has a bucket that does not answer \(\d in a row\)", result.stderr)


OTHERS_BEGUN = (
    'until [ -e "$FAKE_ROOT/begun-0" ] && [ -e "$FAKE_ROOT/begun-2" ]; do sleep 0.02; done'
)


ONE_FAILS = f"""
trap 'echo asked; exit 75' TERM
if [ -d "$workdir" ]; then exit 0; fi
touch "$FAKE_ROOT/begun-$FAKE_WORKER"
if [ $HOSTNAME = t1v-n-0123abcd-w-1 ]; then
  {OTHERS_BEGUN}
  mkdir -p "$workdir"; exit 1
fi
for i in $(seq 9999); do sleep 0.05; done
"""


def test_one_worker_of_three_fails_and_the_others_are_stopped(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS)
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "worker 1 ended with exit status 1: failure 1" in result.stderr
    for worker in (0, 2):
        assert "asked\n" in (cloud.home(worker) / ".sync_jax" / "log").read_text()
    # Every command went to all.
    assert {a for call in cloud.calls("ssh") for a in call if "--worker" in a} == {"--worker=all"}


def test_workers_at_odds_are_stopped_after_a_while(slice_of_three: Cloud):
    """One has ended well, and the others hang."""
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS.replace("exit 1", "exit 0"))
    result = cloud.supervise(SYNC_JAX_PATIENCE="3")
    assert result.returncode == 0, result.stderr
    assert "workers still run" in result.stderr
    assert "preemption 1" in result.stderr


def test_a_worker_that_has_lost_its_home_is_set_up_anew(slice_of_three: Cloud):
    """As after a repair: of its run it knows nothing, and the others have saved."""
    cloud = slice_of_three
    cloud.trainer(
        'trap "exit 75" TERM; if [ -e $HOME/again ]; then exit 0; fi; touch $HOME/again\n'
        "if [ $HOSTNAME = t1v-n-0123abcd-w-1 ]; then\n"
        "  rm -rf $HOME/sync_jax $HOME/.sync_jax; sleep 0.2; kill -KILL $PPID $$\n"
        "fi\nexit 75"
    )
    result = cloud.supervise(SYNC_JAX_PATIENCE="3")
    assert result.returncode == 0, result.stderr
    assert "workers still run: failure 1" in result.stderr


def test_a_worker_that_was_killed_counts_as_failed(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS.replace("exit 1", "kill -KILL $PPID $$"))
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "worker 1 lost its run: failure 1" in result.stderr


def test_a_worker_without_its_bucket_is_a_failure(slice_of_three: Cloud):
    """Its gcsfuse has ended: the run can save no more, and the next start mounts anew."""
    cloud = slice_of_three
    cloud.trainer(
        'trap "exit 75" TERM; if [ -e $HOME/again ]; then exit 0; fi\n'
        'touch $HOME/again "$FAKE_ROOT/begun-$FAKE_WORKER"\n'
        f"if [ $HOSTNAME = t1v-n-0123abcd-w-1 ]; then {OTHERS_BEGUN}; touch $HOME/dead; fi\n"
        "for i in $(seq 9999); do sleep 0.05; done"
    )
    dead_mounts(cloud)
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "worker 1 has lost its bucket, for gcsfuse has ended there: failure 1" in result.stderr
    assert "worker 1: the mount of gs://bucket is dead" in result.stderr


def test_what_failed_while_nobody_watched_is_stopped_and_started_again(slice_of_three: Cloud):
    """One worker has ended, the others wait for it and hold their machines."""
    cloud = slice_of_three
    cloud.trainer(ONE_FAILS)
    for verb in (["create", "--type=v5litepod-16", "--spot", "--yes"], ["setup"], ["run", CONFIG]):
        result = cloud.tpu(verb[0], *verb[1:], WORKDIR)
        assert result.returncode == 0, result.stderr
    cloud.wait((cloud.home(1) / ".sync_jax" / "exit").exists)
    result = cloud.supervise()
    assert result.returncode == 0, result.stderr
    assert "cannot be set up" not in result.stderr
    for worker in (0, 2):
        assert "asked\n" in (cloud.home(worker) / ".sync_jax" / "log").read_text()
