import errno
import json
import os
import struct
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from sync_jax.errors import WriteError
from sync_jax.runtime import training_log
from sync_jax.runtime.training_log import MetricWriter, Progress, duration, read_metrics


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def write_on(device: str) -> None:
        with MetricWriter(tmp_path, start_step=0) as writer:
            writer._file.close()
            writer._file = Path(device).open("w")  # noqa: SIM115
            writer.write(10, "train", {"loss": 1.0})

    with pytest.raises(WriteError, match=r"metrics.jsonl cannot be written: No space left"):
        write_on("/dev/full")
    write_on("/dev/null")  # the control

    def flush():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricWriter(tmp_path, start_step=0) as writer, monkeypatch.context() as patch:
        patch.setattr(writer._events, "flush", flush)
        with pytest.raises(WriteError, match=r"tensorboard cannot be written: No space left"):
            writer.write(10, "train", {"loss": 1.0})


def test_tensorboard_gets_the_same_and_forgets_what_is_done_again(tmp_path):
    with MetricWriter(tmp_path, start_step=7) as writer:
        writer.write(10, "train", {"loss": 0.25, "accuracy": 0.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # a record: length, its checksum, an event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    version, started, loss, accuracy = events
    assert version.file_version == "brain.Event:2"
    assert (started.step, started.session_log.status) == (8, event_pb2.SessionLog.START)
    for event, name, number in ((loss, "loss", 0.25), (accuracy, "accuracy", 0.5)):
        (value,) = event.summary.value
        assert (event.step, value.tag, value.simple_value) == (10, f"train/{name}", number)


def test_a_resumed_log_has_every_step_once_and_its_whole_time(tmp_path):
    assert read_metrics(tmp_path) == []
    with MetricWriter(tmp_path, start_step=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, "train", {"loss": 1.0 / step})
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [10, 20, 30]
    seconds = entries[1]["seconds"]
    assert entries[1] == {"step": 20, "part": "train", "seconds": seconds, "loss": 0.05}
    # Killed in the middle of a line, and resumed from a checkpoint at step 20.
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps(entry | {"seconds": entry["step"]}) + "\n" for entry in entries)
        + '{"step": 40, "par'
    )
    with MetricWriter(tmp_path, start_step=20) as writer:
        writer.write(30, "train", {"loss": 7.0})
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [10, 20, 30]
    assert entries[-1]["loss"] == 7.0
    assert entries[-1]["seconds"] >= 20


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Progress(total_steps=100, start_step=40, batch_size=8) as progress:
        progress.step(41)
        progress.step(50)
        progress.metrics(50, {"loss": 0.25, "accuracy": 0.5, "mean_selection": 0.8, "other": 1.0})
        progress.line("calibrated [bold]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 50/100  ")
    assert "  loss 0.250  accuracy 0.500  mean g 0.800  " in lines[0]
    assert " images/s  " in lines[0]
    assert "other" not in lines[0]
    assert lines[0].endswith("s left")
    assert lines[1:] == ["calibrated [bold]"]


def test_after_ten_steps_the_time_left_is_estimated(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now)
    with Progress(
        total_steps=1000, start_step=0, batch_size=8, advice=lambda left: f" ({left:g})"
    ) as progress:
        for step in range(1, 30):
            now += 100 if step in (1, 4) else 2  # compilation, and an evaluation between two steps
            progress.computed(step)
            assert step > 10 or capsys.readouterr().out == ""
    assert capsys.readouterr().out == "about 33 minutes of training left (1978)\n"


@pytest.mark.parametrize(("seconds", "text"), [
    (0.2, "1 second"), (89.0, "89 seconds"), (91.0, "2 minutes"), (5300.0, "88 minutes"),
    (5500.0, "2 hours"), (1e6, "12 days"),
])  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text
