"""Decides on the device which steps are skipped.

A step is skipped if its loss or gradient norm is not finite. With a threshold z > 0, it is also
skipped if either is more than z standard deviations above its running mean. Mean and variance are
exponential averages over the steps that were not skipped (weight 1/n for the n-th until that is
below 1/32: longer averages remember the fall of the first losses as a deviation for too long). The
threshold applies after 100 such steps.
"""

from typing import Any

import torch
from torch import Tensor

_HORIZON = 32  # steps
_FIRST_JUDGED = 100  # steps before, without skipped ones


class Guard:
    """Judges each step by its loss and gradient norm; the host waits for no device in it."""

    def __init__(self, device: torch.device, zscore: float):
        self._zscore = zscore
        self._mean = torch.zeros(2, dtype=torch.float64, device=device)
        self._variance = torch.zeros(2, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to skip the step, a bool scalar; loss and norm are fp32 scalars."""
        finite = loss.isfinite() & grad_norm.isfinite()
        if not self._zscore:
            return ~finite
        values = torch.stack([loss, grad_norm]).double()
        above = values - self._mean
        spike = (above > self._zscore * self._variance.sqrt()).any() & (
            self._count >= _FIRST_JUDGED
        )
        skip = spike | ~finite
        weight = 1 / (self._count + 1).clamp(max=_HORIZON)
        mean = self._mean + weight * above
        variance = (1 - weight) * (self._variance + weight * above.square())
        self._mean.copy_(torch.where(skip, self._mean, mean))
        self._variance.copy_(torch.where(skip, self._variance, variance))
        self._count.add_((~skip).double())
        return skip

    def state(self) -> dict[str, Any]:
        """Plain numbers; waits for the device."""
        return {
            "mean": self._mean.tolist(),
            "variance": self._variance.tolist(),
            "count": self._count.item(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`. Raises ValueError where the numbers are not a guard's."""
        mean, variance, count = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "variance", "count")
        )
        if not (mean.shape == variance.shape == (2,) and count >= 0 and mean.isfinite().all()):
            raise ValueError(f"the guard's are {state!r:.80}")
        self._mean.copy_(mean)
        self._variance.copy_(variance)
        self._count.fill_(count.item())
