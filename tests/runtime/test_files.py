import errno
import fcntl
import os
import threading

import pytest

from sync_jax.runtime.files import LockedError, flush, locked, write_atomically
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
