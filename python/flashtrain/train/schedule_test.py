import dataclasses
import math
from typing import Any

import pytest
import torch

from flashtrain.train.config import SCHEDULES, OptimConfig
from flashtrain.train.schedule import learning_rate

OPTIM = OptimConfig(lr=2.0, min_lr=0.5, warmup_steps=4)


def optim(schedule: str, **changes: Any) -> OptimConfig:
    return dataclasses.replace(OPTIM, schedule=schedule, **changes)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_never_zero(schedule: str) -> None:
    rates = [learning_rate(step, optim(schedule), max_steps=20) for step in range(4)]
    assert rates == [0.5, 1.0, 1.5, 2.0]


def test_cosine_is_torchs() -> None:
    """torch.optim.lr_scheduler.CosineAnnealingLR, which is written as a recurrence."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=0.5)
    for step in range(4, 20):
        assert learning_rate(step, optim("cosine"), 20) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_linear_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.25, total_iters=16
    )
    for step in range(4, 20):
        assert learning_rate(step, optim("linear"), 20) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("schedule", "end"), [("cosine", 0.5), ("linear", 0.5), ("constant", 2.0), ("wsd", 0.5)]
)
def test_stays_at_its_end(schedule: str, end: float) -> None:
    for step in (20, 21, 1000):
        assert learning_rate(step, optim(schedule, cooldown_steps=5), 20) == pytest.approx(end)


def test_all_warmup_and_no_warmup() -> None:
    assert learning_rate(3, optim("cosine", warmup_steps=4), max_steps=4) == 2.0
    assert learning_rate(0, optim("cosine", warmup_steps=0), max_steps=4) == 2.0
    assert learning_rate(2, optim("cosine", warmup_steps=0), max_steps=4) == pytest.approx(
        0.5 + 1.5 * (1 + math.cos(math.pi / 2)) / 2
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_from_a_rate(schedule: str) -> None:
    rates = [learning_rate(s, optim(schedule, warmup_lr=1.0), max_steps=20) for s in range(4)]
    assert rates == [1.25, 1.5, 1.75, 2.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_flat_tail_after_the_cycle(schedule: str) -> None:
    with_tail = [learning_rate(s, optim(schedule, cycle_steps=12), 20) for s in range(20)]
    assert with_tail[:12] == [learning_rate(s, optim(schedule), 12) for s in range(12)]
    assert with_tail[12:] == [0.5] * 8


def test_wsd_is_flat_then_falls() -> None:
    rates = [learning_rate(s, optim("wsd", cooldown_steps=6), 20) for s in range(4, 21)]
    assert rates[:11] == [2.0] * 11  # up to step 14, the last at full rate
    assert rates[11:] == pytest.approx([1.75, 1.5, 1.25, 1.0, 0.75, 0.5])


def test_inverse_sqrt() -> None:
    """Continuous where warm-up ends, then halved by four times the steps, and floored."""
    rates = optim("inverse_sqrt")
    assert learning_rate(3, rates, 1000) == 2.0
    assert learning_rate(15, rates, 1000) == 1.0
    assert learning_rate(63, rates, 1000) == 0.5
    assert learning_rate(99, rates, 1000) == 0.5
    assert learning_rate(3, optim("inverse_sqrt", warmup_steps=0), 9) == 1.0
