"""Shares of time: on the CPU of a clock that is set, on a GPU of sleeps of known length."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
        for phase, seconds in zip(PHASES, (0.125, 0.625, 0.125, 0.375), strict=True):
            now += seconds
            timer.mark(phase)
    shares = {"data": 0.1, "forward_backward": 0.5, "communication": 0.1, "optimizer": 0.3}
    assert timer.lap() == shares
    assert timer.lap() == {}


def test_backward_ends_before_the_wait_for_a_gradients_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over ranks is held back until the backward pass has been marked."""
    timer = PhaseTimer(torch.device("cpu"))
    marked = threading.Event()
    monkeypatch.setattr(timer, "mark", lambda _: marked.set())
    waits = []

    def sum_when_marked(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        summed: torch.futures.Future[torch.Tensor] = torch.futures.Future()

        def finish() -> None:
            waits.append(marked.wait(timeout=20))
            summed.set_result(bucket.buffer())

        threading.Thread(target=finish).start()
        return summed

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(4, 4))
        model.register_comm_hook(None, sum_when_marked)
        loss = model(torch.ones(1, 4)).sum()
        timer.mark_in_backward(loss, "forward_backward")
        assert not marked.is_set()
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert waits == [True]


@cuda_only
def test_shares_on_a_gpu() -> None:
    timer = PhaseTimer(DEVICE)
    torch.cuda._sleep(2 * 10**9)  # a second of work ahead: the host is far from waiting below
    for _ in range(3):
        timer.start()
        for phase, cycles in zip(PHASES, (10**6, 5 * 10**6, 10**6, 3 * 10**6), strict=True):
            torch.cuda._sleep(cycles)
            timer.mark(phase)
    assert timer.lap() == {}  # the device has not come so far, and nobody waits for it
    torch.cuda.synchronize()
    shares = timer.lap()
    assert shares["data"] == pytest.approx(0.1, abs=0.03)
    assert shares["forward_backward"] == pytest.approx(0.5, abs=0.05)
