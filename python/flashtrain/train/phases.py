"""Measures the phases of a step, without making the host wait for the device."""

import time
from typing import Any

import torch
from torch import Tensor

PHASES = ("data", "forward_backward", "communication", "optimizer")


class PhaseTimer:
    """Adds up the time between marks: on a GPU by events in its stream, else by the clock.

        timer.start()
        batch = loader.next()
        timer.mark("data")              # waiting for the batch
        timer.mark_in_backward(loss, "forward_backward")
        loss.backward()
        timer.mark("communication")     # what of the gradients' sum over ranks was not overlapped
        optimizer.step()
        timer.mark("optimizer")

    Times are read when `lap` is called, for steps that the device has finished by then.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._totals = dict.fromkeys(PHASES, 0.0)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._last: torch.cuda.Event | float = self._now()

    def start(self) -> None:
        """The first phase of a step begins."""
        self._last = self._now()

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to this phase, which ends here."""
        begin, self._last = self._last, self._now()
        if isinstance(begin, float) or isinstance(self._last, float):
            self._totals[phase] += self._last - begin
        else:
            self._pending.append((phase, begin, self._last))

    def mark_in_backward(self, loss: Tensor, phase: str) -> None:
        """Marks `phase` when `loss.backward()` has computed all gradients of this rank.

        DDP and FSDP2 let autograd call back at its end to wait for what they send; callbacks run in
        the order in which they were queued, and the loss's is queued before any other.
        """
        engine: Any = torch.autograd.Variable._execution_engine
        loss.register_hook(lambda _: engine.queue_callback(lambda: self.mark(phase)))

    def lap(self) -> dict[str, float]:
        """Each phase's share of the time since the last lap, in [0, 1]; {} if there was none."""
        while self._pending and self._pending[0][2].query():
            phase, begin, end = self._pending.pop(0)
            self._totals[phase] += begin.elapsed_time(end) / 1e3
        whole = sum(self._totals.values())
        shares = {name: value / whole for name, value in self._totals.items()} if whole else {}
        self._totals = dict.fromkeys(PHASES, 0.0)
        return shares

    def _now(self) -> "torch.cuda.Event | float":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
