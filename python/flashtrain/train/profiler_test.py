"""Profiles of real steps, read back."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from flashtrain.errors import UserError
from flashtrain.train.profiler import StepProfiler, parse_steps


def test_parse_steps() -> None:
    assert parse_steps("3") == range(10, 13)
    assert parse_steps("100-103") == range(100, 104)
    assert parse_steps("7-7") == range(7, 8)
    for text in ("", "0", "x", "5-3", "0-3", "1-2-3", "-3"):
        with pytest.raises(UserError, match="--profile="):
            parse_steps(text)


def test_trace_holds_the_wanted_steps_and_no_others(tmp_path: Path) -> None:
    profiler = StepProfiler(range(3, 5), tmp_path / "profile", 0, torch.device("cpu"))
    notes = []
    for number in range(1, 7):
        with profiler.step(number):
            torch.ones(8, 8) @ torch.ones(8, 8)
        notes.append(profiler.finish(number))
    assert [note is not None for note in notes] == [False, False, False, True, False, False]
    (path,) = (tmp_path / "profile").iterdir()
    assert str(path) in str(notes[3])
    with gzip.open(path, "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [name for name in names if str(name).startswith("step ")] == ["step 3", "step 4"]
    assert names.count("aten::mm") == 2


def test_nothing_is_profiled_unasked(tmp_path: Path) -> None:
    profiler = StepProfiler(range(0), tmp_path, 0, torch.device("cpu"))
    with profiler.step(1):
        pass
    assert profiler.finish(1) is None
    assert not list(tmp_path.iterdir())
