import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtrain.distributed import World
from flashtrain.train.batches import BatchPlan
from flashtrain.train.config import RunConfig
from flashtrain.train.report import Report
from flashtrain.train.stats import StepStats

NAN = math.nan


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def skipped_lines(loss: float, grad_norm: float, micro_losses: list[float]) -> str:
    """Of step 4 of a run of 12 samples a step in micro batches of 2."""
    config = RunConfig.from_mapping(
        "test", {"data": {"batch_size": 2}, "trainer": {"global_batch_size": 12}}
    )
    world = World(0, 1, 0, 1, torch.device("cpu"))
    task: Any = SimpleNamespace(describe=lambda samples: f"place {samples.start}")
    log: Any = Log()
    stats = StepStats(4, loss, grad_norm, True, 1.0, False, micro_losses)
    Report(config, world, task, BatchPlan(config, 1)).skipped(log, stats, in_a_row=3)
    (text,) = log.lines
    return text


@pytest.mark.parametrize(
    ("loss", "grad_norm", "micro_losses", "expected", "first_samples"),
    [
        (
            *(NAN, NAN, [1.0, 1.0, NAN, 1.0, math.inf, 1.0]),
            "not finite, from micro batch 2 (samples 40 to 41), micro batch 4 (samples 44 to 45)",
            [40, 44],
        ),
        (
            *(NAN, NAN, [NAN] * 6),
            "not finite, from micro batch 0 (samples 36 to 37), micro batch 1 (samples 38 to 39),"
            " micro batch 2 (samples 40 to 41), micro batch 3 (samples 42 to 43), 2 more",
            [36, 38, 40, 42],
        ),
        (
            *(2.0, math.inf, [2.0] * 6),
            "not finite, from any of the step (samples 36 to 47)",
            [36],
        ),
        (
            *(2.0, 9.0, [1.0, 1.0, 1.0, 1.0, 1.0, 7.0]),
            "a spike, from micro batch 5 (samples 46 to 47)",
            [46],
        ),
    ],
)
def test_skipped_step_names_its_samples(
    loss: float,
    grad_norm: float,
    micro_losses: list[float],
    expected: str,
    first_samples: list[int],
) -> None:
    line, *places = skipped_lines(loss, grad_norm, micro_losses).splitlines()
    assert line.startswith(f"step 4 skipped: loss {loss}, gradient norm {grad_norm} (3 in a row); ")
    assert line.endswith(expected)
    assert places == [f"  place {first}" for first in first_samples]
