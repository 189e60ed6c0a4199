"""Speed, utilization and memory of a run."""

import dataclasses
import functools
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
    ("GB300", 2500e12),
    ("GB200", 2500e12),
    ("B300", 2250e12),
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


# Bits of NVML's reasons why a clock is not higher; idling and set clocks are not among them.
_THROTTLES = (
    ("by_power", 0x4 | 0x80),  # software power cap, power brake
    ("by_heat", 0x20 | 0x40),  # software and hardware thermal slowdown
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


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clock in MHz, power in W, temperature in degrees C and whether the driver holds the clock
    down, 1 or 0; {} on the CPU, and where NVIDIA's management library is missing."""
    if device.type != "cuda":
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = _nvml_handle(device)
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return {
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_celsius": pynvml.nvmlDeviceGetTemperature(
                handle, pynvml.NVML_TEMPERATURE_GPU
            ),
            **{f"throttled_{name}": float(bool(reasons & bit)) for name, bit in _THROTTLES},
        }
    except Exception:  # a driver without the call, or a container without the device's files
        return {}


@functools.cache
def _nvml_handle(device: torch.device) -> object:
    import pynvml

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())


def versions() -> dict[str, str | None]:
    """Versions of the software, and the device."""
    return {
        "flashtrain": flashtrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


@dataclasses.dataclass(frozen=True)
class Speed:
    """An average over some steps."""

    seconds_per_step: float
    samples_per_second: float


@dataclasses.dataclass
class Stopwatch:
    """Time spent in training steps, without validation, saving and the first step of a process.

    It runs between `start` and `stop`; `lap` gives the part since the last lap.
    """

    steps: int = 0  # totals of the run; checkpoints carry them over
    samples: int = 0
    seconds: float = 0.0
    _lap_start: tuple[int, int, float] = (0, 0, 0.0)  # the totals at the last lap
    _started: float | None = None

    def __post_init__(self) -> None:
        self._lap_start = (self.steps, self.samples, self.seconds)

    @property
    def running(self) -> bool:
        return self._started is not None

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        self._collect()
        self._started = None

    def step(self, samples: int) -> None:
        """Counts one finished step, if the watch is running."""
        if self._started is not None:
            self.steps += 1
            self.samples += samples

    def lap(self) -> Speed | None:
        """Since the last lap; None if no step was timed."""
        self._collect()
        steps, samples, seconds = self._lap_start
        self._lap_start = (self.steps, self.samples, self.seconds)
        return _speed(self.steps - steps, self.samples - samples, self.seconds - seconds)

    @property
    def total(self) -> Speed | None:
        """Over the whole run; None if no step was timed."""
        self._collect()
        return _speed(self.steps, self.samples, self.seconds)

    def _collect(self) -> None:
        if self._started is not None:
            now = time.perf_counter()
            self.seconds += now - self._started
            self._started = now


def _speed(steps: int, samples: int, seconds: float) -> Speed | None:
    return Speed(seconds / steps, samples / seconds) if steps and seconds else None
