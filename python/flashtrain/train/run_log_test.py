"""The log of a run on disks that are full, removed, or were never right."""

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flashtrain.errors import UserError
from flashtrain.train.log_file import LogFile
from flashtrain.train.run_folder import RunFolder
from flashtrain.train.run_log import RunLog


def test_a_record_is_whole_or_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LogFile(tmp_path / "log")
    file.append(b"one\n")
    write = os.write
    left = [2]

    def write_two_bytes(descriptor: int, content: bytes) -> int:
        if not left[0]:
            raise OSError(28, os.strerror(28))
        left[0] -= 1
        return write(descriptor, content[:1])

    with monkeypatch.context() as patch:
        patch.setattr("flashtrain.train.log_file.os.write", write_two_bytes)
        with pytest.raises(OSError, match="No space left"):
            file.append(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    file.append(b"three\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"
    file.close()


def test_tensorboard_reads_what_was_logged_once(tmp_path: Path) -> None:
    for first in (0, 2):  # the second process continues from step 2, which the first one has passed
        with RunLog(RunFolder(tmp_path), step=first, max_steps=5) as log:
            for step in range(first + 1, first + 4):
                log.progress(step, 1.0, "")
                log.scalars(step, {"train/loss": step / 2, "train/none": None})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(step, step / 2) for step in (1, 2, 3, 4, 5)]


def test_texts_that_are_not_utf8_are_logged(tmp_path: Path) -> None:
    with RunLog(RunFolder(tmp_path), step=0, max_steps=1) as log:
        log.text(0, "command", "train --workdir=\udcff")
        log.hyperparameters({"data.path": "\udcff"}, metrics=())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("command/text_summary")
    assert b"--workdir=\\udcff" in event.tensor_proto.string_val[0]


def test_a_log_that_cannot_be_opened_is_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with RunLog(RunFolder(tmp_path), step=0, max_steps=2) as log:
        log.scalars(1, {"train/loss": 1.0})
        log.flush()
        (tmp_path / "tensorboard").unlink()
        log.flush()
        log.progress(2, 1.0, "")
        log.scalars(2, {"train/loss": 1.0})
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "cannot be written: File exists; training goes on" in lines[0]
    assert lines[1].endswith("goes on from step 0")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2, "train/loss": 1.0}\n'


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_metrics_that_are_no_file_are_refused(make, tmp_path: Path) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="to which the run would add"):
        RunLog(RunFolder(tmp_path), step=0, max_steps=1)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '"x"', "\0"])
def test_a_summary_that_is_none(text: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.summary.write_text(text)
    assert folder.read_summary() is None
    folder.summary.unlink()
    os.mkfifo(folder.summary)
    assert folder.read_summary() is None
