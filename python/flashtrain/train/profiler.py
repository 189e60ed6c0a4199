"""A profile of a few steps: the work of host and device, and the content of memory."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from flashtrain import files
from flashtrain.errors import UserError

_WARM_UP = 9  # steps before the first one that is profiled by count
_SNAPSHOT_EVENTS = 200_000  # allocations and frees kept; a step of a GPT has some thousands


def parse_steps(text: str) -> range:
    """Reads "100-103", the steps 100 to 103, or "3", three steps after the run has warmed up.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", text)
    if match and match[2] is None and int(match[1]):
        return range(_WARM_UP + 1, _WARM_UP + 1 + int(match[1]))
    if match and match[2] is not None and 1 <= int(match[1]) <= int(match[2]):
        return range(int(match[1]), int(match[2]) + 1)
    raise UserError(
        f"--profile={text}: give a number of steps, as in --profile=3, or the first and the last, "
        "counted from 1, as in --profile=100-103"
    )


class StepProfiler:
    """Profiles the wanted steps of this process and writes into `folder`

    rank<r>.trace.json.gz     for Perfetto, chrome://tracing, or TensorBoard's profile plugin
    rank<r>.memory.pickle     GPU only: a snapshot for PyTorch's memory_viz

    Profiled steps are slower, so read a run's speed without the profiler.
    """

    def __init__(self, steps: range, folder: Path, rank: int, device: torch.device):
        """`steps` are counted from 1, as the log does; an empty range profiles nothing."""
        self._steps = steps
        self._base = folder / f"rank{rank}"
        self._on_gpu = device.type == "cuda"
        self._profile: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds the work of one step."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._start()
        with torch.profiler.record_function(f"step {number}"):
            yield

    def finish(self, number: int) -> str | None:
        """To be called after each step; after the last one wanted writes the files and says so."""
        if self._profile is None or number + 1 in self._steps:
            return None
        if self._on_gpu:
            torch.cuda.synchronize()
        profile, self._profile = self._profile, None
        profile.stop()
        try:
            written = self._write(profile)
        except (OSError, RuntimeError) as error:  # torch's files raise the latter
            reason = files.cause(error) if isinstance(error, OSError) else error
            return f"cannot write the profile to {self._base.parent}: {reason}; training goes on"
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
        return f"wrote a profile of {len(self._steps)} steps to {written}"

    def _write(self, profile: torch.profiler.profile) -> str:
        self._base.parent.mkdir(parents=True, exist_ok=True)
        written = f"{self._base}.trace.json.gz"
        profile.export_chrome_trace(written)
        if self._on_gpu:
            snapshot = f"{self._base}.memory.pickle"
            torch.cuda.memory._dump_snapshot(snapshot)
            written += f" and {snapshot}"
        return written

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            torch.cuda.synchronize()
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_EVENTS)
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.start()
