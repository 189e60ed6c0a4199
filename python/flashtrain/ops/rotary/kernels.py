"""The torch.library ops under flashtrain.ops.rotary, and the autograd around them.

    rotary   a new tensor: rotated heads, and the others copied
    rotary_  in place; the heads that are not rotated are not touched

x is [batch, seqlen, (packed,) heads, head_dim], with cu_seqlens [total, (packed,) heads, head_dim].
The first num_heads_q heads turn by (cos, sin), the next num_heads_k by (cos_k, sin_k), which are
those of the queries where they are None; `packed` entries count as heads, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops._library import eager, launch_context, register, to_kernel

# --- Kernels and fakes ----------------------------------------------------------------------------


def _last_adjacent(tensor: Tensor) -> Tensor:
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    # Not contiguous(), which leaves the strides of an empty tensor as they are.
    return tensor.clone(memory_format=torch.contiguous_format)


def _contiguous(tensor: Tensor | None) -> object:
    return None if tensor is None else to_kernel(tensor.contiguous())


def _run(
    x: Tensor,
    out: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    num_heads_q: int,
    num_heads_k: int,
    seqlen_offset: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    _kernels.rotary(
        to_kernel(x),
        to_kernel(out),
        _contiguous(cos),
        _contiguous(sin),
        _contiguous(cos_k),
        _contiguous(sin_k),
        num_heads_q,
        num_heads_k,
        seqlen_offset,
        _contiguous(seqlen_offsets),
        _contiguous(cu_seqlens),
        to_kernel(position_ids),
        interleaved,
        conjugate,
        launch_context(x),
    )


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _kernel(x: Tensor, *args: Any) -> Tensor:
    out = _empty_like(x)
    _run(_last_adjacent(x), out, *args)
    return out


def _fake(x: Tensor, *args: Any) -> Tensor:
    return _empty_like(x)


def _inplace_kernel(x: Tensor, *args: Any) -> None:
    _run(x, None, *args)


def _inplace_fake(x: Tensor, *args: Any) -> None:
    pass


# --- Schemas --------------------------------------------------------------------------------------

_ARGS = (
    "Tensor cos, Tensor sin, Tensor? cos_k, Tensor? sin_k, Tensor? seqlen_offsets, "
    "Tensor? cu_seqlens, Tensor? position_ids, SymInt num_heads_q, SymInt num_heads_k, "
    "SymInt seqlen_offset, bool interleaved, bool conjugate"
)

rotary = register(f"rotary(Tensor x, {_ARGS}) -> Tensor", _kernel, _fake)
rotary_ = register(f"rotary_(Tensor(a!) x, {_ARGS}) -> ()", _inplace_kernel, _inplace_fake)

_rotary = eager(rotary, _kernel)
_rotary_in_place = eager(rotary_, _inplace_kernel)


# --- Autograd -------------------------------------------------------------------------------------


class Rotary(Function):
    """x rotated, in place or not. Saves the tables and the indices, not x.

    The gradient is never rotated in place: it may be shared with other nodes of the graph.
    """

    @staticmethod
    def forward(
        ctx, x, cos, sin, cos_k, sin_k, seqlen_offsets, cu_seqlens, position_ids, num_heads_q,
        num_heads_k, seqlen_offset, interleaved, inplace,
    ):  # fmt: skip
        tensors = (cos, sin, cos_k, sin_k, seqlen_offsets, cu_seqlens, position_ids)
        ctx.save_for_backward(*tensors)
        ctx.options = (num_heads_q, num_heads_k, seqlen_offset, interleaved)
        if not inplace:
            return _rotary(x, *tensors, *ctx.options, False)
        _rotary_in_place(x, *tensors, *ctx.options, False)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return _rotary(dout, *ctx.saved_tensors, *ctx.options, True), *[None] * 12
