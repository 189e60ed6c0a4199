"""What users of other mixed-precision optimizers have reported, held against FusedAdamW."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtrain.ops.adamw import FusedAdamW


def _load(model: nn.Linear) -> None:
    model.load_state_dict({"weight": torch.full((4, 4), 5.0)})


@torch.no_grad()
def _clamp(model: nn.Linear) -> None:
    model.weight.clamp_(2.0, 3.0)


def _after(optimizer_class: Any, dtype: torch.dtype, change: Callable[[nn.Linear], None]) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False).to(dtype)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        if step == 0:
            change(model)
    return model.weight.detach().float()


@pytest.mark.parametrize("change", [_load, _clamp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_loaded_or_clamped_between_steps_stay(
    dtype: torch.dtype, change: Callable[[nn.Linear], None]
) -> None:
    """NVIDIA/Megatron-LM#174: float32 copies of the weights undid what was loaded after them."""
    ours, torchs = (_after(kind, dtype, change) for kind in (FusedAdamW, torch.optim.AdamW))
    torch.testing.assert_close(ours, torchs, rtol=0.0, atol=0.05)
