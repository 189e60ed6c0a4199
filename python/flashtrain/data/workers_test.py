"""Processes that tokenize die at rare moments: this is reported, and nothing waits for them.

preparation_kill_test.py has the others, in real programs.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing import popen_forkserver
from pathlib import Path

import pytest

from flashtrain.data import DataError
from flashtrain.data.corpus import Corpus, Piece, Texts
from flashtrain.data.workers import Work, tokenize

ENCODERS = 4


def siblings() -> list[int]:
    """The processes that have the same parent as this one."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
            stat = Path("/proc", name, "stat").read_bytes()
            if int(stat.rpartition(b")")[2].split()[1]) == os.getppid():
                found.append(int(name))
    return [pid for pid in found if pid != os.getpid()]


@dataclasses.dataclass(frozen=True)
class LeavesNoEncoder:
    """A shard that stops all encoders, is read to its end, and has them killed a second later."""

    files = ()

    def pieces(self) -> Iterator[Piece]:
        while len(encoders := siblings()) < ENCODERS:
            time.sleep(0.01)
        for pid in encoders:
            os.kill(pid, signal.SIGSTOP)
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {' '.join(map(str, encoders))}"])
        yield Piece("text", True)


def test_nobody_is_left_to_be_told_that_there_is_no_more_text(tmp_path):
    work = Work(Corpus({"train": (LeavesNoEncoder(),)}), "bytes", tmp_path, 100)
    with pytest.raises(DataError, match="was killed by SIGKILL; the machine may be out of memory"):
        tokenize(work, ENCODERS, lambda done: None)


def test_a_process_that_dies_before_it_is_told_what_to_do(tmp_path, monkeypatch):
    def launch(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")  # nobody reads what it is to do

    monkeypatch.setattr(popen_forkserver.Popen, "_launch", launch)
    work = Work(Corpus({"train": (Texts(("text",)),)}), "bytes", tmp_path, 100)
    with pytest.raises(DataError, match="was killed as it began; the machine may be out of memory"):
        tokenize(work, 1, lambda done: None)
