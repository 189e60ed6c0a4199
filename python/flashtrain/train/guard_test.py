import json
import math

import pytest
import torch

from flashtrain.train.guard import Guard

CPU = torch.device("cpu")


def judge(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard(torch.tensor(loss), torch.tensor(norm)))


@pytest.mark.parametrize("zscore", [0.0, 6.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_start(zscore: float, bad: float) -> None:
    guard = Guard(CPU, zscore)
    assert judge(guard, bad)
    assert judge(guard, 1.0, bad)
    assert not judge(guard, 1.0)


def steps(count: int) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 2, generator=generator)
    return [(3 + 0.1 * a, 1 + 0.05 * b) for a, b in noise.tolist()]


def test_spikes_are_skipped_after_a_hundred_steps() -> None:
    guard = Guard(CPU, 6.0)
    assert not judge(guard, 100.0, 100.0)  # the first steps have nothing to be judged by
    guard = Guard(CPU, 6.0)
    assert not any(judge(guard, *values) for values in steps(150))
    assert judge(guard, 5.0)
    assert judge(guard, 3.0, 2.0)
    assert not judge(guard, 1.0, 0.5)  # far below is no spike
    assert not Guard(CPU, 0.0)(torch.tensor(1e30), torch.tensor(1e30))


def test_mean_and_variance_are_those_of_the_steps_taken() -> None:
    guard, taken = Guard(CPU, 1e6), steps(30)
    for values in taken:
        judge(guard, *values)
        judge(guard, math.nan)  # leaves no trace
    state = guard.state()
    exact = torch.tensor(taken, dtype=torch.float64)
    assert state["count"] == 30
    assert state["mean"] == pytest.approx(exact.mean(0).tolist(), rel=1e-6)
    assert state["variance"] == pytest.approx(exact.var(0, correction=0).tolist(), rel=1e-4)


def test_state_continues_exactly() -> None:
    guard, other = Guard(CPU, 6.0), Guard(CPU, 6.0)
    for values in steps(120):
        judge(guard, *values)
    other.load_state(json.loads(json.dumps(guard.state())))
    for values in [*steps(40), (5.0, 1.0)]:
        assert judge(guard, *values) == judge(other, *values)
    assert guard.state() == other.state()
