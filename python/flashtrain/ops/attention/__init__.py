"""Scaled dot product attention, forward and backward, on CPU and CUDA: the fastest at hand.

    out = dropout(softmax(scores)) v
    scores = softcap * tanh(softmax_scale * q k^T / softcap) - alibi_slope * |distance|

The public functions have flash-attn 2's names and arguments (`from flash_attn import ...`), and one
more, `backend`. docs/attention.md has features, backends, numerics and errors.

Legend: B batch, Sq queries, Sk keys of a sequence, H query heads, Hk key heads (H a multiple of
Hk), D head dim.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flashtrain.ops._arguments import check_float, checked
from flashtrain.ops._autograd import needs_autograd
from flashtrain.ops.attention import dispatch
from flashtrain.ops.attention.checks import (
    check_heads,
    check_options,
    check_sequences,
    window_limits,
)
from flashtrain.ops.attention.external import PEERS, Call
from flashtrain.ops.attention.native import Attention

_MISSING = dict.fromkeys(set(dispatch.BACKENDS) - dispatch.installed(), "it is not installed")
_TIMES = dispatch.read_times()

Output: TypeAlias = Any  # a Tensor; with return_attn_probs (out, lse, probabilities)

# --- The call -------------------------------------------------------------------------------------


def _request(q: Tensor, k: Tensor, v: Tensor, call: Call) -> dispatch.Request:
    capability = 0
    if q.is_cuda:
        properties = torch.cuda.get_device_properties(q.device)
        capability = 10 * properties.major + properties.minor
    compiling = torch.compiler.is_compiling()
    return dispatch.Request(
        device=q.device.type,
        capability=capability,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        seqlen_q=call.max_seqlen_q,
        seqlen_k=call.max_seqlen_k,
        empty=q.numel() == 0 or k.numel() == 0,
        varlen=call.cu_seqlens_q is not None,
        window_left=call.window_left,
        window_right=call.window_right,
        softcap=call.softcap > 0.0,
        alibi=call.alibi_slopes is not None,
        dropout=call.dropout_p > 0.0,
        deterministic=call.deterministic or torch.are_deterministic_algorithms_enabled(),
        needs_grad=needs_autograd(q, k, v),
        compiling=compiling,
        transforming=not compiling and torch._C._are_functorch_transforms_active(),
        zero_scale=call.softmax_scale == 0.0,
    )


def _has_no_device(q: Tensor) -> bool:
    """Whether it is a meta tensor, or a fake one of a GPU that is not here."""
    return q.is_meta or (q.is_cuda and not torch.cuda.is_initialized())


def _choose(request: dispatch.Request, forced: str | None) -> str:
    if request.compiling:  # sizes may be symbolic, and tracing costs nothing later
        return dispatch.choose_working(request, _MISSING, _TIMES, forced)
    return _remembered_choice(request, forced)


# Sequence lengths that change with every batch do not fill the memory.
@functools.lru_cache(maxsize=4096)
def _remembered_choice(request: dispatch.Request, forced: str | None) -> str:
    return dispatch.choose_working(request, _MISSING, _TIMES, forced)


@torch.compiler.allow_in_graph  # Dynamo cannot trace storage_offset; what comes after it can
def _vectors(x: Tensor) -> Tensor:
    """x, or a copy if kernels that read 16 bytes at a time, as the peers' do, could not read it."""
    step = 16 // x.element_size()
    *outer, inner = x.stride()
    distances = (*outer, x.storage_offset())
    if inner == 1 and not x.is_neg() and not any(distance % step for distance in distances):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _native(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Our own kernels: (out, lse, rng_state)."""
    rng_state = None
    if call.dropout_p > 0.0:
        # {seed, offset} on the op's device, from torch's own generator of it: manual_seed, CUDA
        # graphs, torch.compile and checkpointing treat it as any random number.
        # Made from q, so that it is fake where q is.
        rng_state = torch.randint_like(q.new_empty(2, dtype=torch.int64), 0, 2**62)
    out, lse = Attention.apply(
        q,
        k,
        v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.alibi_slopes,
        rng_state,
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.softmax_scale,
        call.softcap,
        call.window_left,
        call.window_right,
        call.dropout_p,
    )
    return out, lse, rng_state


def _with_probabilities(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend not in (None, "triton", "cpu"):
        raise ValueError(
            f"backend: {backend!r} does not return attention probabilities; supported with "
            "return_attn_probs: None, 'triton', 'cpu'"
        )
    from flashtrain.ops.attention.probabilities import signed_probabilities

    if not _has_no_device(q):
        _choose(_request(q, k, v, call), backend or ("triton" if q.is_cuda else "cpu"))
    out, lse, rng_state = _native(q, k, v, call)
    if call.cu_seqlens_q is not None:
        call = call._replace(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    return out, lse, signed_probabilities(q, k, lse, rng_state, call)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    backend: str | None,
) -> Output:
    varlen = cu_seqlens_q is not None
    check_heads(q, k, v, varlen)
    batch, longest_q, longest_k = q.shape[0], q.shape[-3], k.shape[-3]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_sequences(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        batch = cu_seqlens_q.shape[0] - 1
        # An upper bound may be of any size; kernels size their grids and scratch memory by it.
        longest_q, longest_k = min(max_seqlen_q, longest_q), min(max_seqlen_k, longest_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    check_options(q, batch, dropout_p, scale, softcap, alibi_slopes)
    left, right = window_limits(window_size, causal, longest_q, longest_k)
    call = Call(
        cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale, left, right, softcap,
        alibi_slopes, dropout_p, deterministic,
    )  # fmt: skip
    if return_attn_probs:
        return _with_probabilities(q, k, v, call, max_seqlen_q, max_seqlen_k, backend)
    if _has_no_device(q):
        return _native(q, k, v, call)[0]
    chosen = _choose(_request(q, k, v, call), backend)
    if chosen in PEERS:
        return PEERS[chosen](_vectors(q), _vectors(k), _vectors(v), call)
    return _native(q, k, v, call)[0]


# --- Public functions -----------------------------------------------------------------------------


@checked
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str | None = None,
) -> Output:
    """dropout(softmax(scores)) v for a batch of sequences of equal lengths.

    Args:
      q: [B, Sq, H, D], float32, float16 or bfloat16, any strides.
      k, v: [B, Sk, Hk, D], q's dtype; H is a multiple of Hk, neighbouring query heads share a key
        head.
      dropout_p: probability in [0, 1) of zeroing an attention weight; survivors are scaled by
        1 / (1 - p). The caller passes 0 in evaluation.
      softmax_scale: factor of q k^T, at least 0; default 1 / sqrt(D).
      causal: a query sees no key after its position, which is i + Sk - Sq for query i: the last
        query sits at the last key (bottom right alignment).
      window_size: (left, right), keys seen before and after the query's position; negative: all.
      softcap: scores become softcap * tanh(scores / softcap); 0: they stay.
      alibi_slopes: float32 [H] or [B, H]; slope * |position - key| is subtracted from the scores.
      deterministic: only backends whose gradients are bitwise reproducible. So does
        torch.use_deterministic_algorithms.
      return_attn_probs: also return what is described below, for tests and debugging.
      backend: one of `dispatch.BACKENDS` instead of the fastest.

    Returns out [B, Sq, H, D] in q's dtype; 0 for a query that sees no key. With return_attn_probs
    (out, lse, probabilities): lse float32 [B, H, Sq], the log-sum-exp of the scores, without
    gradient, -inf for such a query; probabilities [B, H, Sq, Sk] in q's dtype, negative where
    dropout drops them, and empty where dropout_p is 0.

    Saved for backward: q, k, v, out, lse, and in place of the dropout mask two integers.

    Raises:
      ValueError: an argument does not fit, or no backend or not the one asked for can take it.
      RuntimeError: the device reported an error.
    """
    return _attention(
        q, k, v, None, None, 0, 0, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs, backend,
    )  # fmt: skip


@checked
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str | None = None,
) -> Output:
    """`flash_attn_func` with k and v in one tensor, kv [B, Sk, 2, Hk, D], read in place."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv: got shape {list(kv.shape)}; supported: [B, Sk, 2, Hk, D]")
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, backend=backend,
    )  # fmt: skip


@checked
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str | None = None,
) -> Output:
    """`flash_attn_func` with q, k and v in one tensor, qkv [B, S, 3, H, D], read in place."""
    check_float("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(
            f"qkv: got shape {list(qkv.shape)}; supported: [B, S, 3, H, D], H and D at least 1"
        )
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs, backend=backend,
    )  # fmt: skip


@checked
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Output:
    """`flash_attn_func` for sequences of different lengths, one after the other.

    So documents that share a window are kept apart: their boundaries are cu_seqlens, of q and k
    both. An empty sequence is one of length 0.

    Args:
      q: [total_q, H, D].
      k, v: [total_k, Hk, D].
      cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on q's device, from 0 to total_q and total_k:
        sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1]. On the CPU they are checked; on
        CUDA they are not, for that would synchronise, and rows beyond the last are not written.
      max_seqlen_q, max_seqlen_k: at least the longest sequence's.
      block_table: a paged key-value cache, which is not supported: must be None.
      others: as `flash_attn_func`.

    Returns out [total_q, H, D]; with return_attn_probs also lse [H, total_q] and probabilities
    [B, H, max_seqlen_q, max_seqlen_k].
    """
    if block_table is not None:
        raise ValueError(
            "block_table: got a tensor; supported: None, as attention here is for training only, "
            "without a paged key-value cache"
        )
    return _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, backend,
    )  # fmt: skip
