"""The files that a process leaves if it is killed before any of its operations on files."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flashtrain.distributed import World
from flashtrain.train import checkpoint
from flashtrain.train.config import TrainerConfig
from flashtrain.train.run_folder import RunFolder
from flashtrain.train.saver import Held, Saver

OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


def killed_before(number: int, work: Callable[[], object]) -> bool:
    """Does `work` in a process of its own, which dies before that operation, counted from 1.

    Gives whether it came so far.
    """
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), status
        return status == signal.SIGKILL
    code = 1
    try:
        done = 0

        def kill(event: str, arguments: object) -> None:
            nonlocal done
            if event in OPERATIONS:
                done += 1
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        signal.alarm(60)
        sys.addaudithook(kill)
        work()
        code = 0
    finally:
        os._exit(code)


def every_kill(folder: Path, work: Callable[[Path], object]) -> Iterator[tuple[Path, bool]]:
    """Copies of `folder` in which `work` was killed ever later; the last one, in which it was not.

    Gives each with whether it was killed.
    """
    number, killed = 0, True
    while killed:
        number += 1
        copy = folder.with_name(f"{folder.name}-{number}")
        _copy(folder, copy)
        killed = killed_before(number, lambda copy=copy: work(copy))  # type: ignore[misc]
        yield copy, killed
    assert number > 3


def _copy(folder: Path, copy: Path) -> None:
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_dir():
            _copy(path, copy / path.name)
        else:
            (copy / path.name).write_bytes(path.read_bytes())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, step: int) -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    saver = Saver(folder, world, TrainerConfig(keep_checkpoints=2))
    saver.save(step, {"x": Held(torch.full((1000,), float(step)))}, {"state": {}})
    saver.wait()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_save_leaves_whole_checkpoints(damaged: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step)
    if damaged:  # the third was saved before, and is saved again
        (folder / "step_00000003").mkdir()
        (folder / "step_00000003" / "manifest.json").write_text("{")
    whole = ["step_00000002", "step_00000003"] + ["step_00000003.damaged"] * damaged
    found = []
    for copy, killed in every_kill(folder, lambda folder: save(folder, 3)):
        warnings: list[str] = []
        newest = checkpoint.newest(copy, warnings.append)
        assert newest is not None
        assert bool(warnings) == ((copy / "step_00000003").exists() and newest.step == 2)
        assert float(checkpoint.Reader(newest).read("x")[0]) == newest.step
        found.append(newest.step)
        if not killed:
            assert names(copy) == whole
        checkpoint.remove_unfinished(copy)
        assert not any(name.startswith(".") for name in names(copy))
        if newest.step == 2:
            save(copy, 3)
            assert names(copy) == whole
    assert found == sorted(found)
    assert set(found) == {2, 3}


def test_metrics_and_summary_are_the_old_or_the_new(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [f'{{"step": {step}}}\n' for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 9')
    RunFolder(folder).write_summary({"step": 5})

    def go_on(folder: Path) -> None:
        run = RunFolder(folder)
        run.drop_metrics_after(5)
        run.write_summary({"step": 8})

    for copy, killed in every_kill(folder, go_on):
        kept = (copy / "metrics.jsonl").read_text()
        summary = json.loads((copy / "summary.json").read_text())
        assert kept.startswith("".join(lines[:5]))
        assert summary in ({"step": 5}, {"step": 8})
        if not killed:
            assert kept == "".join(lines[:5])
            assert summary == {"step": 8}
            assert names(copy) == ["metrics.jsonl", "summary.json"]


def test_metrics_go_on_where_a_line_was_cut(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for cut in ('{"step": 2}', '{"step"', "\0\0\n", "[]\n", '\xff{"step": 1}\n'):
        run.metrics.write_text('{"step": 1}\n' + cut, encoding="latin-1")
        run.drop_metrics_after(3)
        assert run.metrics.read_text() == '{"step": 1}\n', cut
