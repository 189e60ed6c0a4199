"""A step's numbers, brought from the device to the host one step late."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What came out of one optimizer step; equal on every rank."""

    step: int  # optimizer steps done, this one included
    loss: float  # mean over the global batch, before the update
    grad_norm: float  # of the mean gradient, before clipping
    skipped: bool  # loss or gradient was not finite and nothing was updated
    stop: bool  # some rank was asked to stop


class DelayedStats:
    """Hands out each step's numbers when the next step has been launched.

    The copy to the host is asynchronous, and reading step n waits for step n only while the device
    already has step n + 1 to work on: the host sees every step, and the device never waits for it.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None

    def push(self, step: int, values: torch.Tensor) -> StepStats | None:
        """Takes a step's numbers, [4] in the order of StepStats; gives those of the step before."""
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        else:
            host, copied = values, None
        previous = self.flush()
        self._pending = (step, host, copied)
        return previous

    def flush(self) -> StepStats | None:
        """The numbers not handed out yet, waiting for them; None if there are none."""
        if self._pending is None:
            return None
        step, host, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        loss, grad_norm, skipped, stop = host.tolist()
        return StepStats(step, loss, grad_norm, skipped != 0, stop != 0)
