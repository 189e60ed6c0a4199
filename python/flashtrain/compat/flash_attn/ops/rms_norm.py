"""RMSNorm with dropout and residual, in all of flash-attn's forms."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.compat.flash_attn.ops._subset import add_norm_subset
from flashtrain.compat.flash_attn.ops.layer_norm import (
    DropoutAddLayerNorm,
    DropoutAddLayerNormParallelResidual,
    add_norm_parallel_residual,
)
from flashtrain.compat.flash_attn.ops.triton import layer_norm as triton
from flashtrain.ops._arguments import checked
from flashtrain.ops.layer_norm import dropout_add_rms_norm, rms_norm

__all__ = [
    "DropoutAddRMSNorm",
    "DropoutAddRMSNormParallelResidual",
    "RMSNorm",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_parallel_residual",
    "dropout_add_rms_norm_subset",
    "rms_norm",
]


@checked
def dropout_add_rms_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`dropout_add_layer_norm_subset` with RMSNorm."""
    return add_norm_subset(
        x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset,
        rowscale_const, out_numrows, prenorm, residual_in_fp32, return_dropout_mask,
        is_rms_norm=True,
    )  # fmt: skip


@checked
def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """`dropout_add_layer_norm_parallel_residual` with RMSNorm."""
    return add_norm_parallel_residual(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=True,
    )  # fmt: skip


class DropoutAddRMSNorm(DropoutAddLayerNorm):
    """dropout + add + RMSNorm with parameter weight [hidden_size] and no bias."""

    _is_rms_norm = True


class DropoutAddRMSNormParallelResidual(DropoutAddLayerNormParallelResidual):
    """The same with RMSNorm: parameters weight0 and, unless tied, weight1; no biases."""

    _is_rms_norm = True


class RMSNorm(triton.RMSNorm):
    """`triton.layer_norm.RMSNorm` with the arguments of this module's, which are fewer."""

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
