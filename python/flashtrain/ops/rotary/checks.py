"""Checks of the arguments of flashtrain.ops.rotary: ValueError says what came and is supported."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._arguments import check_float, check_written, dtype_names

_INDEX_DTYPES = (torch.int32, torch.int64)


def check_x(name: str, x: Tensor, shapes: dict[int, str]) -> None:
    """`shapes`: what is supported, by number of dimensions."""
    check_float(name, x)
    if x.dim() not in shapes:
        supported = ", ".join(shapes.values())
        raise ValueError(f"{name}: got shape {list(x.shape)}; supported: {supported}")


def check_in_place(name: str, x: Tensor) -> None:
    check_written(name, x)
    if not torch.compiler.is_compiling() and x.is_neg():  # a compiled call writes a copy back
        raise ValueError(
            f"{name}: is a view with a negative bit; supported in place: {name}.resolve_neg()"
        )
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name}: got elements {x.stride(-1)} apart in the last dimension; supported in place: "
            "adjacent"
        )
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: is a leaf Variable that requires grad; supported in place: a computed tensor"
        )


def check_table(name: str, table: Tensor, cos: Tensor, x: Tensor) -> None:
    half = x.shape[-1] // 2
    if table.dim() != 2 or table.shape != cos.shape or not 1 <= table.shape[1] <= half:
        raise ValueError(
            f"{name}: got shape {list(table.shape)}; supported: [positions, R / 2], of all tables "
            f"the same, with R at most the head dim, {x.shape[-1]}"
        )
    if table.dtype != torch.float32 and table.dtype != x.dtype:
        supported = dtype_names(torch.float32, x.dtype)
        raise ValueError(f"{name}: got dtype {table.dtype}; supported: {supported}")
    if table.dtype != cos.dtype:
        raise ValueError(f"{name}: got dtype {table.dtype}; supported: that of cos, {cos.dtype}")
    if table.device != x.device:
        raise ValueError(f"{name}: is on {table.device}; supported: {x.device}, as x")
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad, and has no gradient here; supported: a tensor that does not, "
            f"{name}.detach()"
        )


def _check_index(name: str, index: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if index.dtype not in _INDEX_DTYPES:
        supported = dtype_names(*_INDEX_DTYPES)
        raise ValueError(f"{name}: got dtype {index.dtype}; supported: {supported}")
    if index.shape != shape:
        raise ValueError(f"{name}: got shape {list(index.shape)}; supported: {list(shape)}")
    if index.device != x.device:
        raise ValueError(f"{name}: is on {index.device}; supported: {x.device}, as x")


def _check_range(first: int, length: int, table_len: int) -> None:
    if first < 0 or first + length > table_len:
        raise ValueError(
            f"seqlen_offsets: got {first}, so positions {first} to {first + length - 1}; "
            f"supported: those of the tables, 0 to {table_len - 1}"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    _check_index("cu_seqlens", cu_seqlens, (max(cu_seqlens.numel(), 1),), x)
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] > x.shape[0]:
            raise ValueError(
                f"cu_seqlens: got {bounds}; supported: ascending, from 0 to at most "
                f"{x.shape[0]}, the tokens"
            )


def check_positions(
    x: Tensor,
    table_len: int,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """Returns position_ids as [B, S]."""
    is_tensor = isinstance(seqlen_offsets, Tensor)
    if position_ids is not None:
        if cu_seqlens is not None or is_tensor or seqlen_offsets != 0:
            raise ValueError(
                "position_ids: given with seqlen_offsets or cu_seqlens; supported: by itself"
            )
        if position_ids.dim() == 1 or (position_ids.dim() == 2 and position_ids.shape[0] == 1):
            position_ids = position_ids.expand(x.shape[0], *position_ids.shape[-1:])
        _check_index("position_ids", position_ids, tuple(x.shape[:2]), x)
        return position_ids
    num_sequences = x.shape[0]
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, x)
        num_sequences = cu_seqlens.shape[0] - 1
    if is_tensor:
        _check_index("seqlen_offsets", seqlen_offsets, (num_sequences,), x)
    else:
        # How long sequences are, the host knows only where there is no cu_seqlens.
        length = x.shape[1] if cu_seqlens is None else min(x.shape[0], 1)
        _check_range(seqlen_offsets, length, table_len)
    return None
