"""layer_norm with x0 for some rows of x, and z of some: torch's operations and the norm.

A subset is a tensor of row numbers from 1, one for each row of x, with 0 for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops.layer_norm import calls


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
    checks: calls.Checks, name: str, subset: Tensor, count: int | None, limit: int
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


def rows_with_z(checks: calls.Checks, x: Tensor, out_subset: Tensor, out_numrows: int) -> Tensor:
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


def dropout_add_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    options: calls.NormOptions,
    layerscale: Tensor | None,
    x0_subset: Tensor | None,
    out_subset: Tensor | None,
    rowscale_const: float,
    out_numrows: int,
    residual_in_fp32: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z, x, mask) with x [rows, D], z [out_numrows, D], and the bool mask of x0's shape or None.

    torch scales and drops the rows of x0 and adds them to their rows of x; the norm reads the rows
    that z has, and no others.
    """
    checks = calls.Checks(x0, dropout_p, options)
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

    x_dtype = calls.x_dtype_of(x0, residual, residual_in_fp32)
    x, mask = calls.dropout(x0 if rowscale_const == 1.0 else x0.float() * rowscale_const, dropout_p)
    if layerscale is not None:
        x = x.float() * layerscale
    x = x.reshape(-1, cols)
    if x0_subset is not None:
        x = TakeRows.apply(x, x0_numbers)
    x = (x if residual is None else x + residual).to(x_dtype)
    z_rows = x if out_subset is None else rows_with_z(checks, x, out_subset, out_numrows)
    z = calls.norm(z_rows, weight, bias, options._replace(z_dtype=options.z_dtype or x0.dtype))
    return z, x, mask
