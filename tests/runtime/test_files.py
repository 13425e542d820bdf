import errno
import fcntl
import os
import socket
import threading

import pytest

from sync_jax.errors import InputError
from sync_jax.runtime.files import LockedError, check_plain, flush, locked, write_atomically
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.workdir import owned


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"

    def fails(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for text in (b"whole", b"new"):
        write_atomically(path, lambda file, text=text: file.write(text))
        assert path.read_bytes() == text
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"new"


def test_flush_is_tolerant_of_file_systems_without_it_alone(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    number = errno.EINVAL
    flush(tmp_path)
    number = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        flush(tmp_path)


def test_a_lock_is_refused_or_waited_for(tmp_path):
    path, told, entered = tmp_path / "lock", threading.Event(), threading.Event()

    def second():
        with locked(path, waiting=told.set):
            entered.set()

    thread = threading.Thread(target=second)
    with locked(path):
        with pytest.raises(LockedError, match=rf"^process {os.getpid()} on "), locked(path):
            pass
        thread.start()
        assert told.wait(60)
        assert not entered.is_set()
        path.unlink()  # the one that waits makes a new one
    thread.join(60)
    assert entered.is_set()
    assert path.exists()


def test_a_folder_that_cannot_be_locked_is_used_and_that_is_said(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with owned(tmp_path, Processes()):
        assert capsys.readouterr().out == (
            f"{tmp_path} cannot be locked there: see that no other run uses it meanwhile\n"
        )


def listening(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, listening, lambda path: path.symlink_to("/dev/zero"), os.mkdir],
    ids=["FIFO", "socket", "link to a device", "folder"],
)
def test_what_is_no_plain_file_is_refused_in_a_run_folder(make, tmp_path, monkeypatch):
    """Whatever its name, and in checkpoints however deep. Links to files and folders are good."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for path in (run, elsewhere / "7" / "state" / "d"):
        path.mkdir(parents=True)
    (run / "checkpoints").symlink_to(elsewhere)
    (run / "config.json").symlink_to(elsewhere / "nothing")
    (run / "metrics.jsonl").write_text("")
    (run / "report.json").symlink_to("metrics.jsonl")
    (run / "own").mkdir()
    names = [".lock", "config.json.incomplete", "predictions_test.npz", "nonfinite.jsonl"]
    names += ["checkpoints/7/_CHECKPOINT_METADATA", "checkpoints/7/state/d/1a"]
    for name in names:
        check_plain(run)
        path = run / name
        monkeypatch.chdir(path.parent)  # a socket's path must be short
        make(path)
        if make is os.mkdir and not path.name.endswith((".lock", ".npz", ".jsonl")):
            check_plain(run)
        else:
            with pytest.raises(InputError, match=rf"^{path} is no plain file; move it away$"):
                check_plain(run)
        path.rmdir() if make is os.mkdir else path.unlink()
