import time

import pytest
import torch

from flashtrain.train.meters import (
    Speed,
    Stopwatch,
    peak_flops,
    peak_flops_by_name,
    peak_memory_bytes,
)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops(name: str, teraflops: float | None) -> None:
    found = peak_flops_by_name(name)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(64 << 20)  # 256 MiB
    after = peak_memory_bytes(torch.device("cpu"))
    assert block.numel()
    assert after >= max(before, 256 << 20)


def test_stopwatch_counts_running_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch(steps=2, samples=100, seconds=10.0)
    watch.step(8)  # not running
    now = 107.0
    watch.start()
    now = 108.0
    watch.step(2)
    now = 110.0
    watch.step(4)
    watch.stop()
    now = 150.0
    assert (watch.steps, watch.samples, watch.seconds) == (4, 106, 13.0)
    assert watch.lap() == Speed(1.5, 2.0)
    assert watch.lap() is None
    assert watch.total == Speed(3.25, 106 / 13)
    watch.start()
    now = 151.0
    watch.step(4)
    assert watch.lap() == Speed(1.0, 4.0)
    assert watch.total == Speed(14.0 / 5, 110 / 14)


def test_stopwatch_without_steps() -> None:
    assert Stopwatch().lap() is None
    assert Stopwatch().total is None
