"""The norms with x0 for some rows, and out of some: torch's operations and the fused norm.

A subset is a tensor of row numbers from 1, one for each row of residual_out, with 0 for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops.layer_norm import all_ones_mask, norm, residual_dtype_of
from flashtrain.ops.layer_norm.checks import Checks
from flashtrain.ops.layer_norm.parallel import dropout


class TakeRows(Function):
    """Row r of the result is row numbers[r] - 1 of x [rows, D], or zeros where the number is 0.

    No number but 0 may come twice: gradients are copied into place, not added up.
    """

    @staticmethod
    def forward(ctx, x, numbers):
        ctx.save_for_backward(numbers)
        ctx.rows = x.shape[0]
        absent = (numbers == 0).unsqueeze(-1)
        if x.shape[0] == 0:
            return x.new_zeros((numbers.shape[0], x.shape[1]))
        return x.index_select(0, (numbers - 1).clamp_min(0)).masked_fill(absent, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (numbers,) = ctx.saved_tensors
        return put_rows(dy, numbers, ctx.rows), None


def put_rows(values: Tensor, numbers: Tensor, rows: int) -> Tensor:
    """[rows, ...] with values[r] at row numbers[r] - 1, and zeros in the others.

    Values numbered 0 go to a row before the first, which is cut off.
    """
    buffer = values.new_zeros((rows + 1, *values.shape[1:]))
    return buffer.index_copy_(0, numbers, values)[1:]


def can_be_read(numbers: Tensor) -> bool:
    """Without waiting for a device; fake and mapped tensors hold nothing to read."""
    return (
        numbers.is_cpu
        and type(numbers) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def check_subset(
    checks: Checks, name: str, subset: Tensor, count: int | None, limit: int
) -> Tensor:
    """The numbers of a subset, [R] int64, 1 to limit, or 0. What a device holds is not read."""
    checks.here(name, subset)
    if subset.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: got dtype {subset.dtype}; supported: torch.int32 or torch.int64, numbers of "
            "rows from 1, or 0 for none"
        )
    numbers = subset.reshape(-1).long()
    if count is not None and numbers.numel() != count:
        raise ValueError(
            f"{name}: got {numbers.numel()} elements; supported: {count}, one for each row of x"
        )
    if can_be_read(numbers) and numbers.numel() > 0:
        low, high = numbers.aminmax()
        if low < 0 or high > limit:
            raise ValueError(
                f"{name}: got numbers from {low} to {high}; supported: 0 to {limit}, 0 for no row"
            )
        if (times := numbers.bincount(minlength=1)[1:]).numel() and times.max() > 1:
            raise ValueError(
                f"{name}: got {int(times.argmax()) + 1} more than once; supported: each row once"
            )
    # Where that cannot be looked at, a number out of range counts as 0.
    return numbers.masked_fill((numbers < 0) | (numbers > limit), 0)


def rows_with_out(checks: Checks, x: Tensor, out_subset: Tensor, out_numrows: int) -> Tensor:
    """The rows of x [R, D] that out_subset numbers, in the order of the numbers."""
    if not 0 <= out_numrows <= x.shape[0]:
        raise ValueError(
            f"out_numrows: got {out_numrows}; supported: 0 to {x.shape[0]}, the rows of x"
        )
    numbers = check_subset(checks, "out_subset", out_subset, x.shape[0], out_numrows)
    if can_be_read(numbers):
        count = int(numbers.count_nonzero())
        if count != out_numrows:
            raise ValueError(
                f"out_numrows: got {out_numrows}; supported: {count}, as out_subset numbers"
            )
    places = torch.ones_like(numbers).cumsum(0)  # 1 to R; fake for a fake x
    return TakeRows.apply(x, put_rows(places, numbers, out_numrows))


def _regrouped(name: str, rows: Tensor, x0: Tensor) -> tuple[int, ...]:
    """The shape of [rows, D] with the dimensions of x0 but for the first."""
    inner = x0.shape[1:-1].numel()
    if inner == 0 or rows.shape[0] % inner != 0:
        raise ValueError(
            f"{name}: gives {rows.shape[0]} rows; supported: a multiple of {inner}, so that they "
            f"can take the shape of x0, {list(x0.shape)}, but for its first dimension"
        )
    return (rows.shape[0] // inner, *x0.shape[1:])


def add_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None,
    x0_subset: Tensor | None,
    out_subset: Tensor | None,
    rowscale_const: float,
    out_numrows: int,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    *,
    is_rms_norm: bool,
) -> Tensor | tuple[Tensor, ...]:
    """out, or (out[, residual_out][, mask]).

    torch scales and drops the rows of x0 and adds them to their rows of residual_out; the norm
    reads the rows that out has, and no others.
    """
    checks = Checks(x0, dropout_p, epsilon)
    if x0.dim() < 2:
        raise ValueError(f"x0: got shape {list(x0.shape)}; supported: [n, ..., D], rows of D")
    checks.columns("", weight, bias=bias, layerscale=layerscale)
    cols, x0_rows = x0.shape[-1], x0.shape[:-1].numel()
    rows = x0_rows if x0_subset is None else None
    if residual is not None:
        checks.here("residual", residual)
        if residual.dim() == 0 or residual.shape[-1] != cols:
            raise ValueError(
                f"residual: got shape {list(residual.shape)}; supported: [..., {cols}], to fit x0 "
                f"{list(x0.shape)}"
            )
        residual = residual.reshape(-1, cols)
        rows = residual.shape[0] if rows is None else rows
        checks.like("residual", residual, torch.Size((rows, cols)))
    if x0_subset is not None:
        x0_numbers = check_subset(checks, "x0_subset", x0_subset, rows, x0_rows)
        rows = x0_numbers.numel()
    assert rows is not None

    residual_dtype = residual_dtype_of(x0, residual, residual_in_fp32)
    x, mask = dropout(x0 if rowscale_const == 1.0 else x0.float() * rowscale_const, dropout_p)
    if layerscale is not None:
        x = x.float() * layerscale
    x = x.reshape(-1, cols)
    if x0_subset is not None:
        x = TakeRows.apply(x, x0_numbers)
    x = (x if residual is None else x + residual).to(residual_dtype)
    normed = x if out_subset is None else rows_with_out(checks, x, out_subset, out_numrows)
    out = norm(normed, weight, bias, epsilon, is_rms_norm, False, x0.dtype)
    results = [out.reshape(_regrouped("out_subset", out, x0))]
    if prenorm:
        results.append(x.reshape(_regrouped("x0_subset", x, x0)))
    if return_dropout_mask:
        results.append(all_ones_mask(x0) if mask is None else mask.to(torch.uint8))
    return tuple(results) if len(results) > 1 else results[0]
