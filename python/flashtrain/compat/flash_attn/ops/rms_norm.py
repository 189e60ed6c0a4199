"""RMSNorm with dropout and residual: `flashtrain.ops.layer_norm`."""

from __future__ import annotations

import torch

from flashtrain.ops import layer_norm as ops
from flashtrain.ops.layer_norm import (
    DropoutAddRMSNorm,
    DropoutAddRMSNormParallelResidual,
    dropout_add_rms_norm,
    dropout_add_rms_norm_parallel_residual,
    dropout_add_rms_norm_subset,
    rms_norm,
)

__all__ = [
    "DropoutAddRMSNorm",
    "DropoutAddRMSNormParallelResidual",
    "RMSNorm",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_parallel_residual",
    "dropout_add_rms_norm_subset",
    "rms_norm",
]


class RMSNorm(ops.RMSNorm):
    """`flashtrain.ops.layer_norm.RMSNorm` with the arguments of this module's, which are fewer."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)
