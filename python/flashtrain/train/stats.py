"""A step's numbers, brought from the device to the host one step late."""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class StepStats:
    """The results of one optimizer step; equal on every rank."""

    step: int  # optimizer steps done, this one included
    loss: float  # mean over the global batch, before the update
    grad_norm: float  # of the mean gradient, before clipping
    skipped: bool  # the guard found loss or gradient unfit and nothing was updated
    loss_scale: float  # with which the step was computed; 1 where there is none
    stop: bool  # some rank was asked to stop
    micro_losses: list[float]  # of each micro batch of the global batch, in its order

    @classmethod
    def from_values(cls, step: int, values: list[float]) -> "StepStats":
        loss, grad_norm, skipped, loss_scale, stop, *micro_losses = values
        return cls(step, loss, grad_norm, skipped != 0, loss_scale, stop != 0, micro_losses)

    @property
    def searches_loss_scale(self) -> bool:
        """Whether fp16 gradients have overflowed, as they may while the loss scale is searched for;
        the loss must not."""
        return (
            self.loss_scale > 1 and math.isfinite(self.loss) and not math.isfinite(self.grad_norm)
        )

    def worst_micro_batches(self) -> list[int]:
        """Those whose loss is not finite, or else the one with the largest."""
        bad = [i for i, loss in enumerate(self.micro_losses) if not math.isfinite(loss)]
        return bad or [max(range(len(self.micro_losses)), key=self.micro_losses.__getitem__)]


class DelayedStats:
    """Hands out each step's numbers when the next step has been launched.

    The copy to the host is asynchronous, and reading step n waits for step n only while the device
    already has step n + 1 to work on: the host sees every step, and the device never waits for it.
    On the CPU a step is done when it has been launched, and nothing is delayed.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event] | None = None

    def push(self, step: int, values: torch.Tensor) -> StepStats | None:
        """Accepts a step's numbers as TrainStep gives them; hands out those that are due."""
        if not values.is_cuda:
            return StepStats.from_values(step, values.tolist())
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        previous = self.flush()
        self._pending = (step, host, copied)
        return previous

    def flush(self) -> StepStats | None:
        """The numbers not handed out yet, waiting for them; None if there are none."""
        if self._pending is None:
            return None
        step, host, copied = self._pending
        self._pending = None
        copied.synchronize()
        return StepStats.from_values(step, host.tolist())
