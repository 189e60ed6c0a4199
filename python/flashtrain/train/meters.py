"""Speed, utilisation and memory of a run."""

import dataclasses
import platform
import resource
import time

import numpy as np
import torch

import flashtrain

# Dense bf16 (fp16) matmul peak in FLOP/s by a part of torch.cuda.get_device_name(), the most
# specific first. From NVIDIA's data sheets, without sparsity.
_PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("A6000", 154.8e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a device; None on the CPU and for GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by torch.cuda.get_device_name(); None if not in the table."""
    for part, flops in _PEAK_FLOPS:
        if part in device_name:
            return flops
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def versions() -> dict[str, str | None]:
    """What computed a run."""
    return {
        "flashtrain": flashtrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


@dataclasses.dataclass
class Stopwatch:
    """Time spent in training steps, without validation, saving and the first step of a process.

    It runs between `start` and `stop`; `lap` gives the part since the last lap.
    """

    steps: int = 0  # totals of the run; checkpoints carry them over
    seconds: float = 0.0
    _lap_steps: int = 0
    _lap_seconds: float = 0.0
    _started: float | None = None

    @property
    def running(self) -> bool:
        return self._started is not None

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        self._collect()
        self._started = None

    def step(self) -> None:
        """Counts one finished step, if the watch is running."""
        if self._started is not None:
            self.steps += 1
            self._lap_steps += 1

    def lap(self) -> float | None:
        """Seconds per step since the last lap; None if no step was timed."""
        self._collect()
        lap = self._lap_seconds / self._lap_steps if self._lap_steps else None
        self._lap_steps, self._lap_seconds = 0, 0.0
        return lap

    @property
    def seconds_per_step(self) -> float | None:
        """Over the whole run; None if no step was timed."""
        self._collect()
        return self.seconds / self.steps if self.steps else None

    def _collect(self) -> None:
        if self._started is None:
            return
        now = time.perf_counter()
        self.seconds += now - self._started
        self._lap_seconds += now - self._started
        self._started = now
