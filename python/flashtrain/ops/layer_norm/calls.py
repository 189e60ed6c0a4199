"""What stands between the public functions of layer_norm and its ops: checks and compositions.

`dropout_add_norm` is one op; `dropout_add_norm_parallel`, two branches and two norms of their sum,
is composed of it and of torch's operations, as is what subset.py holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtrain.ops._arguments import FLOAT_DTYPE_NAMES, FLOAT_DTYPES, check_float, dtype_names
from flashtrain.ops.layer_norm import kernels as ops


class NormOptions(NamedTuple):
    """The norm itself, and what its arguments are called where they come from, for errors."""

    epsilon: float
    is_rms_norm: bool
    zero_centered_weight: bool = False
    z_dtype: torch.dtype | None = None  # None: x0's
    x0_name: str = "x0"
    epsilon_name: str = "epsilon"
    suffix: str = ""  # of weight and bias: weight0, bias0


# --- Checks ---------------------------------------------------------------------------------------


class Checks:
    """Checks of x0 on construction, and of other arguments against it."""

    def __init__(self, x0: Tensor, dropout_p: float, options: NormOptions) -> None:
        self.x0 = x0
        self.name = options.x0_name
        self._check_x0()
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p: got {dropout_p}; supported: at least 0 and less than 1")
        if not options.epsilon >= 0.0:
            raise ValueError(
                f"{options.epsilon_name}: got {options.epsilon}; supported: at least 0"
            )
        if options.z_dtype is not None and options.z_dtype not in FLOAT_DTYPES:
            raise ValueError(f"out_dtype: got {options.z_dtype}; supported: {FLOAT_DTYPE_NAMES}")

    def _check_x0(self) -> None:
        x0, name = self.x0, self.name
        check_float(name, x0)
        if x0.dim() == 0 or x0.shape[-1] == 0:
            raise ValueError(
                f"{name}: got shape {list(x0.shape)}; supported: [..., D] with D, the size that is "
                "normalised, at least 1"
            )

    def here(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.x0.device:
            raise ValueError(
                f"{name}: is on {tensor.device}; supported: {self.name}'s device, {self.x0.device}"
            )

    def like(self, name: str, tensor: Tensor, shape: torch.Size) -> None:
        """Of this shape, in float32 or x0's dtype, on x0's device."""
        self.here(name, tensor)
        x0 = self.x0
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}; supported: {list(shape)}, to fit "
                f"{self.name} {list(x0.shape)}"
            )
        if tensor.dtype != x0.dtype and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name}: got dtype {tensor.dtype}; supported: "
                f"{dtype_names(torch.float32, x0.dtype)}"
            )

    def columns(self, suffix: str, weight: Tensor, **vectors: Tensor | None) -> None:
        """weight and what shares its dtype, [D]; `suffix` ends their names."""
        self.like(f"weight{suffix}", weight, self.x0.shape[-1:])
        for name, vector in vectors.items():
            if vector is None:
                continue
            self.like(f"{name}{suffix}", vector, self.x0.shape[-1:])
            if vector.dtype != weight.dtype:
                raise ValueError(
                    f"{name}{suffix}: got dtype {vector.dtype}; supported: weight{suffix}'s, "
                    f"{weight.dtype}"
                )

    def rowscale(self, rowscale: Tensor) -> None:
        self.like("rowscale", rowscale, self.x0.shape[:-1])
        if rowscale.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "rowscale: requires grad, and has no gradient here; supported: a tensor that does "
                "not, rowscale.detach()"
            )


# --- One op ---------------------------------------------------------------------------------------


def x_dtype_of(x0: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    if residual is not None:
        return residual.dtype
    return torch.float32 if residual_in_fp32 else x0.dtype


def all_ones_mask(x0: Tensor) -> Tensor:
    return torch.ones_like(x0, dtype=torch.uint8, memory_format=torch.contiguous_format)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, options: NormOptions) -> Tensor:
    epsilon, is_rms_norm, zero_centered_weight, z_dtype = options[:4]
    return ops.norm(x, weight, bias, epsilon, is_rms_norm, zero_centered_weight, z_dtype or x.dtype)


def dropout_add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    options: NormOptions,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    residual_in_fp32: bool = False,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z, x, mask); the mask is None where it is not asked for, or nothing is dropped."""
    checks = Checks(x0, dropout_p, options)
    checks.columns(options.suffix, weight, bias=bias)
    if layerscale is not None:
        checks.columns("", weight, layerscale=layerscale)
    if residual is not None:
        checks.like("residual", residual, x0.shape)
    if rowscale is not None:
        checks.rowscale(rowscale)
    x_dtype = x_dtype_of(x0, residual, residual_in_fp32)
    use_dropout = dropout_p > 0.0
    if (
        residual is None
        and rowscale is None
        and layerscale is None
        and not use_dropout
        and x_dtype == x0.dtype
    ):
        return norm(x0, weight, bias, options), x0, None
    rng_state = None
    if use_dropout:
        # {seed, offset} on the op's device, from torch's own generator of it: manual_seed, CUDA
        # graphs, torch.compile and checkpointing treat it as any random number. A fake one for a
        # fake x0.
        rng_state = torch.randint_like(x0.new_empty(2, dtype=torch.int64), 2**62)
    epsilon, is_rms_norm, zero_centered_weight, z_dtype = options[:4]
    return ops.dropout_add_norm(
        x0,
        residual,
        weight,
        bias,
        rowscale,
        layerscale,
        rng_state,
        dropout_p,
        epsilon,
        is_rms_norm,
        zero_centered_weight,
        z_dtype or x0.dtype,
        x_dtype,
        with_mask=with_mask and use_dropout,
    )


# --- Two branches, two norms ----------------------------------------------------------------------


def dropout(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """torch's dropout, (kept and scaled in float32, bool mask), or (x, None) without dropout."""
    if dropout_p == 0.0:
        return x, None
    kept, mask = torch.native_dropout(x.float(), dropout_p, True)
    return kept, mask.bool()  # of an empty x, torch's mask has the dtype of x


def dropout_add_norm_parallel(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    options: NormOptions,
    residual_in_fp32: bool = False,
    with_mask: bool = False,
    rowscale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(z0, z1, x, mask0, mask1); z1 is None without weight1, mask1 (bool) without x1.

    x1 is added to the residual by torch, x0 joins in the op, and the second norm reads x: against
    kernels made for this, 1.5 times the bytes in forward and twice in backward.
    """
    checks = Checks(x0, dropout_p, options)
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
            raise ValueError(
                f"x1: got dtype {x1.dtype}; supported: {options.x0_name}'s, {x0.dtype}"
            )
        branch, mask1 = dropout(x1, dropout_p)
        x_dtype = x_dtype_of(x0, residual, residual_in_fp32)
        residual = (branch if residual is None else branch + residual).to(x_dtype)
    z0, x, mask0 = dropout_add_norm(
        x0, residual, weight0, bias0, dropout_p, options, rowscale,
        residual_in_fp32=residual_in_fp32, with_mask=with_mask,
    )  # fmt: skip
    z1 = None
    if weight1 is not None:
        z1 = norm(x, weight1, bias1, options._replace(z_dtype=options.z_dtype or x0.dtype))
    return z0, z1, x, mask0, mask1
