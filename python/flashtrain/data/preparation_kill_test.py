"""Preparation killed at any moment, in real processes, continues and ends with the same bytes."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flashtrain.data.preparation import LOOK, prepare_source
from flashtrain.data.sources import parse_source

_PREPARE = """
import pathlib, sys
from flashtrain.data import DataError
from flashtrain.data.preparation import prepare_source
from flashtrain.data.sources import parse_source
try:
    folder = pathlib.Path(sys.argv[2])
    prepare_source(parse_source(sys.argv[1]), folder, workers=2, chunk_chars=2**15)
except DataError as error:
    sys.exit(f"error: {error}")
"""
RANDOM_KILLS = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """Some 3 MB in 8,000 documents: half a hundred chunks."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(3)
    words = [f" word{number}" for number in range(1000)]
    for number in range(2):
        rows = ("".join(draw.choices(words, k=draw.randrange(90))) for _ in range(4000))
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"{number}.jsonl").write_text(text)
    return f"jsonl:{folder}/*.jsonl:text"


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected") / "prepared"
    prepare_source(parse_source(dataset), folder, workers=2)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All but how the text's files looked, which is another matter on each disk."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != LOOK}


def start(dataset: str, folder: Path) -> subprocess.Popen[str]:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-c", _PREPARE, dataset, str(folder)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def kill(run: subprocess.Popen[str]) -> None:
    """Kills the program; the processes it has started end by themselves."""
    run.kill()
    run.communicate(timeout=120)  # stderr ends with the last of them, as all of them have it open


def children(pid: int) -> list[int]:
    """The processes whose parent it is. Not from /proc/<pid>/task: some kernels list none there."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends meanwhile
            stat = Path("/proc", name, "stat").read_bytes()
            if int(stat.rpartition(b")")[2].split()[1]) == pid:
                found.append(int(name))
    return found


def has_begun(worker: int) -> bool:
    """Whether it has got its work: then a thread of it waits for the end of the program."""
    try:
        return len(os.listdir(f"/proc/{worker}/task")) > 1
    except FileNotFoundError:
        return False


def finish(dataset: str, folder: Path) -> None:
    run = start(dataset, folder)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors


def test_killed_at_random_moments(dataset, expected, tmp_path):
    began = time.monotonic()
    finish(dataset, tmp_path / "undisturbed")
    duration = time.monotonic() - began
    assert contents(tmp_path / "undisturbed") == expected
    draw = random.Random(11)
    folder, partial = tmp_path / "prepared", tmp_path / ".prepared.partial"
    killed = 0
    for attempt in itertools.count():
        if killed == RANDOM_KILLS:
            break
        anew, began = not partial.exists(), time.monotonic()
        run = start(dataset, folder)
        try:
            _, errors = run.communicate(timeout=draw.uniform(0.2, 1.0) * duration)
            assert run.returncode == 0, errors
            if anew:  # the machine has become quicker
                duration = time.monotonic() - began
        except subprocess.TimeoutExpired:
            kill(run)
            killed += 1
        if folder.exists():  # it was done; the next attempts start from nothing
            assert contents(folder) == expected
            folder.rename(tmp_path / f"whole{attempt}")
    finish(dataset, folder)
    assert contents(folder) == expected
    assert not partial.exists()


def names(partial: Path) -> list[str]:
    """The names among the chunks, while they are there."""
    try:
        return os.listdir(partial / "chunks")
    except FileNotFoundError:
        return []


def stamps(partial: Path) -> dict[str, int]:
    """When each whole chunk was written."""
    found = {}
    for name in names(partial):
        if name.endswith(".chunk"):
            with contextlib.suppress(FileNotFoundError):
                found[name] = (partial / "chunks" / name).stat().st_mtime_ns
    return found


@pytest.mark.parametrize(
    "moment",
    [
        lambda partial: len(stamps(partial)) >= 5,
        lambda partial: "plan.json" in names(partial),
        lambda partial: "plan.json" in names(partial) and len(stamps(partial)) < 40,
        lambda partial: any(name.startswith("train.order") for name in names(partial)),
        lambda partial: (partial / "out" / "train.bin").exists(),
        lambda partial: (partial / "out" / "manifest.json").exists(),
        lambda partial: (partial.parent / "prepared").exists(),
    ],
    ids=["tokenising", "planned", "joining", "shuffling", "gathering", "finishing", "done"],
)
def test_killed_in_each_stage(dataset, expected, tmp_path, moment: Callable[[Path], bool]):
    """As soon as the stage has begun. Work that is done is not done again: chunks stay."""
    folder, partial = tmp_path / "prepared", tmp_path / ".prepared.partial"
    run = start(dataset, folder)
    while not moment(partial) and run.poll() is None:
        time.sleep(0.0005)
    kill(run)
    before = stamps(partial)
    run = start(dataset, folder)
    unchanged = True
    while run.poll() is None:
        now = stamps(partial)
        unchanged &= all(now[name] == before[name] for name in now.keys() & before.keys())
        time.sleep(0.01)
    assert run.returncode == 0, run.communicate()
    assert unchanged
    assert contents(folder) == expected
    assert not partial.exists()


def test_a_killed_worker_is_one_line(dataset, expected, tmp_path):
    folder = tmp_path / "prepared"
    run = start(dataset, folder)
    workers: list[int] = []
    while not workers:
        assert run.poll() is None, run.communicate()
        # The children of the helper that forks them, which is a child of the program.
        workers = [w for helper in children(run.pid) for w in children(helper) if has_begun(w)]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "was killed by SIGKILL; the machine may be out of memory" in lines[0]
    finish(dataset, folder)
    assert contents(folder) == expected
