"""The torch.library ops under flashtrain.ops.attention, and the autograd around them.

    attention_forward   out, lse
    attention_backward  dq, dk, dv

q, k and v are [batch, seqlen, heads, head_dim], or, with cu_seqlens of both, [total, heads,
head_dim]; lse is float32 [batch, heads, seqlen_q] or [heads, total_q]. CPU tensors go to the C++
kernels (cc/attention), CUDA tensors to the Triton kernels, which are imported when the first come.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._autograd import Function, once_differentiable
from flashtrain.ops._library import launch_context, register, to_kernel

# --- Kernels and fakes ----------------------------------------------------------------------------


def _heads(tensor: Tensor) -> Tensor:
    """The tensor if the elements of a head are adjacent, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    *batch, rows, heads, _ = q.shape
    return _empty_like(q), q.new_empty((*batch, heads, rows), dtype=torch.float32)


class Options(NamedTuple):
    """Of a call, without its tensors, in the order of the ops and of the kernels."""

    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    softcap: float
    window_left: int
    window_right: int
    dropout_p: float


def _triton_options(q: Tensor, cu_seqlens_q: Tensor | None, options: Options) -> Any:
    from flashtrain.ops.attention import triton  # only where there is CUDA

    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    varlen = cu_seqlens_q is not None
    return triton, triton.AttentionOptions(varlen, batch, **options._asdict())


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    q, k, v = _heads(q), _heads(k), _heads(v)
    extras = [_contiguous(t) for t in (cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state)]
    out, lse = _forward_outputs(q)
    if q.is_cuda:
        module, triton_options = _triton_options(q, cu_seqlens_q, Options(*options))
        cu_q, cu_k, slopes, rng = extras
        module.forward(q, k, v, out, lse, slopes, cu_q, cu_k, rng, triton_options)
    else:
        launch_context(q)
        tensors: list[Any] = [to_kernel(t) for t in (q, k, v, out, lse, *extras)]
        _kernels.attention_forward(*tensors, *options)
    return out, lse


def _forward_fake(q: Tensor, *_: Any):
    return _forward_outputs(q)


def _backward_kernel(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (_heads(t) for t in (dout, q, k, v, out))
    lse = lse.contiguous()
    extras = [_contiguous(t) for t in (cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state)]
    grads = (_empty_like(q), _empty_like(k), _empty_like(v))
    if q.is_cuda:
        module, triton_options = _triton_options(q, cu_seqlens_q, Options(*options))
        cu_q, cu_k, slopes, rng = extras
        module.backward(
            dout, q, k, v, out, lse, slopes, cu_q, cu_k, rng, *grads, triton_options
        )  # fmt: skip
    else:
        launch_context(q)
        tensors = (dout, q, k, v, out, *grads, lse, *extras)
        arguments: list[Any] = [to_kernel(t) for t in tensors]
        _kernels.attention_backward(*arguments, *options)
    return grads


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any):
    return _empty_like(q), _empty_like(k), _empty_like(v)


# --- Schemas --------------------------------------------------------------------------------------

_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? rng_state, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, float softcap, "
    "SymInt window_left, SymInt window_right, float dropout_p"
)

attention_forward = register(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    _forward_kernel,
    _forward_fake,
)
attention_backward = register(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward_kernel,
    _backward_fake,
)


# --- Autograd -------------------------------------------------------------------------------------


class Attention(Function):
    """(out, lse). Saves q, k, v, out, lse, and two integers in place of the dropout mask."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, *options):
        extras = (cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state)
        out, lse = attention_forward(q, k, v, *extras, *options)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, *extras)
        ctx.options = options
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        dq, dk, dv = attention_backward(dout, *ctx.saved_tensors, *ctx.options)
        grads = (
            grad if needed else None for grad, needed in zip((dq, dk, dv), ctx.needs_input_grad)
        )
        return (*grads, *[None] * (4 + len(ctx.options)))
