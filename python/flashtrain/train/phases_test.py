"""Shares of time: on the CPU of a clock that is set, on a GPU of sleeps of known length."""

import time

import pytest
import torch

from flashtrain.testing.devices import DEVICE, cuda_only
from flashtrain.train.phases import PHASES, PhaseTimer


def test_shares_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer(torch.device("cpu"))
    assert timer.lap() == {}
    for _ in range(3):
        now += 5.0  # between steps: no phase
        timer.start()
        for phase, seconds in zip(PHASES, (0.125, 0.75, 0.375), strict=True):
            now += seconds
            timer.mark(phase)
    assert timer.lap() == {"data": 0.1, "forward_backward": 0.6, "optimizer": 0.3}
    assert timer.lap() == {}


@cuda_only
def test_shares_on_a_gpu() -> None:
    timer = PhaseTimer(DEVICE)
    torch.cuda._sleep(2 * 10**9)  # a second of work ahead: the host is far from waiting below
    for _ in range(3):
        timer.start()
        for phase, cycles in zip(PHASES, (10**6, 6 * 10**6, 3 * 10**6), strict=True):
            torch.cuda._sleep(cycles)
            timer.mark(phase)
    assert timer.lap() == {}  # the device has not come so far, and nobody waits for it
    torch.cuda.synchronize()
    shares = timer.lap()
    assert shares["data"] == pytest.approx(0.1, abs=0.03)
    assert shares["forward_backward"] == pytest.approx(0.6, abs=0.05)
