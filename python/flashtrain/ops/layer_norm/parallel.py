"""The norms for blocks whose attention and MLP run side by side (GPT-J, GPT-NeoX)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtrain.ops.layer_norm import add_norm, norm, residual_dtype_of
from flashtrain.ops.layer_norm.checks import Checks, Names

_NAMES = Names(suffix="0")


class ParallelAddNorm(NamedTuple):
    out0: Tensor
    out1: Tensor | None  # None without weight1
    residual_out: Tensor
    mask0: Tensor | None  # as in AddNorm
    mask1: Tensor | None  # bool; None without x1, or where nothing is dropped


def dropout(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """torch's dropout, (kept and scaled in float32, bool mask), or (x, None) without dropout."""
    if dropout_p == 0.0:
        return x, None
    kept, mask = torch.native_dropout(x.float(), dropout_p, True)
    return kept, mask.bool()  # of an empty x, torch's mask has the dtype of x


def parallel_add_norm(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    *,
    rowscale: Tensor | None = None,
    is_rms_norm: bool = False,
    zero_centered_weight: bool = False,
    residual_in_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
    with_mask: bool = False,
    names: Names = _NAMES,
) -> ParallelAddNorm:
    """residual_out = dropout(x0) + dropout(x1) + residual, and one norm of it or two.

    The arguments are those of `add_norm`, a weight and bias for each norm; x1 None: no second
    branch; weight1 None: the norm is tied.

    x1 is added to the residual by torch, x0 joins in the op, and the second norm reads
    residual_out: against kernels made for this, 1.5 times the bytes in forward, twice in backward.
    """
    checks = Checks(x0, dropout_p, epsilon, out_dtype, names)
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale: got one with x1; supported: either")
    if weight1 is not None:
        checks.columns("1", weight1, bias=bias1)
    elif bias1 is not None:
        raise ValueError("bias1: got one without weight1; supported: both, or neither")
    if residual is not None:
        checks.like("residual", residual, x0.shape)
    mask1 = None
    if x1 is not None:
        checks.like("x1", x1, x0.shape)
        if x1.dtype != x0.dtype:
            raise ValueError(f"x1: got dtype {x1.dtype}; supported: {names.x0}'s, {x0.dtype}")
        branch, mask1 = dropout(x1, dropout_p)
        residual_dtype = residual_dtype_of(x0, residual, residual_in_fp32)
        residual = (branch if residual is None else branch + residual).to(residual_dtype)
    out0, residual_out, mask0 = add_norm(
        x0, residual, weight0, bias0, dropout_p, epsilon, rowscale=rowscale,
        is_rms_norm=is_rms_norm, zero_centered_weight=zero_centered_weight,
        residual_in_fp32=residual_in_fp32, out_dtype=out_dtype, with_mask=with_mask, names=names,
    )  # fmt: skip
    out1 = None
    if weight1 is not None:
        out1 = norm(
            residual_out, weight1, bias1, epsilon, is_rms_norm, zero_centered_weight,
            out_dtype or x0.dtype,
        )  # fmt: skip
    return ParallelAddNorm(out0, out1, residual_out, mask0, mask1)
