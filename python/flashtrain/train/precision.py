"""The number formats in which a step is computed.

| precision | weights, gradients, optimizer | matmuls                | loss scale |
|-----------|-------------------------------|------------------------|------------|
| fp32      | fp32                          | fp32                   | none       |
| tf32      | fp32                          | fp32 in, TF32 products | none       |
| bf16      | fp32 master weights           | bf16 under autocast    | none       |
| fp16      | fp32 master weights           | fp16 under autocast    | dynamic    |

Losses and norms are computed in fp32 in each.
bf16 and fp16 keep one copy of the weights, in fp32, and let `torch.autocast` cast them for each
matmul: 16 bytes per parameter (weight, gradient, two moments), plus 2 for the casts of one forward
pass. With `trainer.low_precision_weights` the model's weights are bf16 or fp16 and the optimizer
keeps an fp32 copy: 16 bytes too (2 weight, 2 gradient, 4 copy, 8 moments) and no casts, and ranks
send half the bytes, but micro batches and ranks add up their gradients in the low precision.
Under FSDP2 the ranks' shards stay fp32 and are cast before they are gathered, see strategy.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The autocast context and the loss scale of one run."""

    def __init__(self, name: str, device: torch.device):
        self._device_type = device.type
        self._dtype = LOW_PRECISION.get(name)
        # "highest" keeps fp32 matmuls exact; elsewhere the remaining fp32 matmuls may use TF32.
        torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
        self.loss_scale = LossScale(device, enabled=name == "fp16")

    @torch.no_grad()
    def round_weights(self, model: nn.Module) -> None:
        """Turns a model's parameters, not its buffers, into the low precision, if there is one."""
        if self._dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self._dtype)

    def autocast(self) -> torch.autocast:
        """A context in which matmuls run in the low precision; does nothing for fp32 and tf32."""
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None)


class LossScale:
    """Dynamic loss scaling on the device (Micikevicius et al. 2018, section 3.2).

    The scale halves when the gradient overflows and doubles after 2,000 steps without overflow.
    torch.amp.GradScaler does the same, but decides from the gradients that one rank holds; here the
    norm over all ranks decides, so that the scale is the same where they hold parts of a gradient.
    """

    _INITIAL = 2.0**16
    _LARGEST = 2.0**100  # far from what the scale needs, and its product with a loss is finite
    _GROWTH_STEPS = 2000

    def __init__(self, device: torch.device, *, enabled: bool):
        self.enabled = enabled
        self.scale = torch.tensor(self._INITIAL if enabled else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """Records a step; `overflow` is a bool scalar on the device."""
        if not self.enabled:
            return
        good = torch.where(overflow, 0, self._good_steps + 1)
        grow = good >= self._GROWTH_STEPS
        factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(max=self._LARGEST)
        self._good_steps.copy_(torch.where(grow, 0, good))

    def state(self) -> dict[str, Any]:
        """Plain numbers; waits for the device."""
        return {"scale": self.scale.item(), "good_steps": self._good_steps.item()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the result of `state`, unless the precision has no loss scale.

        Raises:
            ValueError: the scale is not one that this object can have had.
        """
        if self.enabled:
            if not 0 < state["scale"] <= self._LARGEST:
                raise ValueError(f"the loss scale is {state['scale']!r:.40}")
            self.scale.fill_(state["scale"])
            self._good_steps.fill_(state["good_steps"])
