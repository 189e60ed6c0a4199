"""LayerNorm with dropout and residual, in all of flash-attn's forms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashtrain.compat.flash_attn.ops._subset import add_norm_subset
from flashtrain.ops._arguments import checked
from flashtrain.ops.layer_norm import (
    add_norm,
    all_ones_mask,
    dropout_add_layer_norm,
    layer_norm,
)
from flashtrain.ops.layer_norm.parallel import parallel_add_norm

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddLayerNormParallelResidual",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "dropout_add_layer_norm_subset",
    "layer_norm",
]


def add_norm_parallel_residual(
    x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm,
    residual_in_fp32, return_dropout_mask, *, is_rms_norm: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(out0, out1[, residual_out][, mask0, mask1])."""
    result = parallel_add_norm(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon,
        is_rms_norm=is_rms_norm, residual_in_fp32=residual_in_fp32, with_mask=return_dropout_mask,
    )  # fmt: skip
    results = result[:3] if prenorm else result[:2]
    if not return_dropout_mask:
        return results
    masks = (result.mask0, result.mask1)
    return *results, *(all_ones_mask(x0) if m is None else m.to(torch.uint8) for m in masks)


@checked
def dropout_add_layer_norm_subset(
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
    """`dropout_add_layer_norm` with x0 for some rows, and out of some rows (stochastic depth).

    Row r of residual_out is layerscale * dropout(rowscale_const * x0[x0_subset[r] - 1]) +
    residual[r], or residual[r] alone where x0_subset[r] is 0; its norm is out[out_subset[r] - 1],
    or not computed where out_subset[r] is 0.

    Args:
      x0: [n, ..., D].
      residual: [..., D] of R rows; None: zeros.
      x0_subset: R numbers, int32 or int64, each of 1 to the rows of x0 at most once, or 0. None: x0
        has all rows. A row of x0 that is not named has gradient 0.
      out_subset: R numbers that name each of 1 to out_numrows once, or 0. None: out has all rows.
      rowscale_const: a factor for x0, 1 / (1 - drop rate).
      out_numrows: the rows of out; read where out_subset is given.

    The others as in `dropout_add_layer_norm`. Returns out, or (out[, residual_out][, mask]): out
    and residual_out of shape [m, ..., D] with the inner dimensions of x0, the mask of x0's shape.

    Composed of torch's dropout and indexed copies, and of the fused norm for the rows that out has.
    Other rows have no part in the gradients of weight and bias.

    Raises:
      ValueError: as `dropout_add_layer_norm`; on the CPU also for a number out of range or twice.
        On CUDA the numbers are not read: one out of range counts as 0, of two equal ones one wins.
    """
    return add_norm_subset(
        x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset,
        rowscale_const, out_numrows, prenorm, residual_in_fp32, return_dropout_mask,
        is_rms_norm=False,
    )  # fmt: skip


@checked
def dropout_add_layer_norm_parallel_residual(
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
    """residual_out = dropout(x0) + dropout(x1) + residual; out0 is its norm, out1 a second one.

    For blocks whose attention and MLP run side by side (GPT-J, GPT-NeoX).

    Args:
      x0, x1: [..., D] in one dtype; x1 None: no second branch.
      weight0, bias0, weight1, bias1: [D]; weight1 None: the norm is tied, out1 is None.

    The others as in `dropout_add_layer_norm`. Returns (out0, out1[, residual_out][, mask0, mask1]);
    the masks are uint8 like x0. Composed as `flashtrain.ops.layer_norm.parallel` says.
    """
    return add_norm_parallel_residual(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


class DropoutAddLayerNorm(nn.Module):
    """dropout + add + LayerNorm with parameters weight and bias [hidden_size].

    Args:
      hidden_size: D.
      prenorm: return (out, residual_out) rather than out.
      p: dropout probability, used in training mode only.
      eps: added to the variance.
      residual_in_fp32: keep residual_out in float32 where no residual is passed.
    """

    _is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        if not self._is_rms_norm:
            self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @checked
    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        out, residual_out, _ = add_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            is_rms_norm=self._is_rms_norm,
            residual_in_fp32=self.residual_in_fp32,
        )
        return (out, residual_out) if self.prenorm else out

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, prenorm={self.prenorm}, p={self.p}, eps={self.eps}"


class DropoutAddLayerNormParallelResidual(nn.Module):
    """dropout + add of two branches, and a LayerNorm for each of the two branches that follow.

    Parameters weight0, bias0 and, unless the norm is tied, weight1, bias1 [hidden_size].

    Args:
      hidden_size: D.
      tied_norm: one norm for both; out1 is then None.
      prenorm: return (out0, out1, residual_out) rather than (out0, out1).
      p: dropout probability, used in training mode only.
      eps: added to the variance.
      residual_in_fp32: keep residual_out in float32 where no residual is passed.
    """

    _is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        tied_norm: bool = False,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        names = ["weight0", "weight1", "bias0", "bias1"]
        for name in names:
            absent = (tied_norm and name[-1] == "1") or (self._is_rms_norm and name[0] == "b")
            value = None if absent else torch.empty(hidden_size, device=device, dtype=dtype)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.0 if name.startswith("weight") else 0.0)

    @checked
    def forward(
        self, x0: Tensor, x1: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        result = parallel_add_norm(
            x0,
            x1,
            residual,
            self.weight0,
            self.bias0,
            self.weight1,
            self.bias1,
            self.p if self.training else 0.0,
            self.eps,
            is_rms_norm=self._is_rms_norm,
            residual_in_fp32=self.residual_in_fp32,
        )
        return result[:3] if self.prenorm else result[:2]

    def extra_repr(self) -> str:
        tied = self.weight1 is None
        return f"{self.weight0.shape[0]}, tied_norm={tied}, prenorm={self.prenorm}, p={self.p}"
