"""The checks of the arguments of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._arguments import check_float

_LARGEST = torch.finfo(torch.float32).max


def check_heads(q: Tensor, k: Tensor, v: Tensor, varlen: bool) -> None:
    layout = "[total, heads, D]" if varlen else "[B, seqlen, heads, D]"
    check_float("q", q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != (3 if varlen else 4):
            raise ValueError(f"{name}: got shape {list(tensor.shape)}; supported: {layout}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: got dtype {tensor.dtype}; supported: q's, {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: is on {tensor.device}; supported: q's device, {q.device}")
    if q.shape[-1] == 0 or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k: got shape {list(k.shape)}; supported: the head dim of q {list(q.shape)}, and that "
            "at least 1"
        )
    if k.shape[-2] == 0 or q.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"k: got {k.shape[-2]} heads; supported: a divisor of q's {q.shape[-2]} heads"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: got shape {list(v.shape)}; supported: k's, {list(k.shape)}")
    if not varlen and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: got a batch of {k.shape[0]}; supported: q's, {q.shape[0]}")


def check_sequences(
    q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest < 0:
            raise ValueError(f"{name}: got {longest}; supported: the longest sequence's, or more")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens.dtype != torch.int32:
            raise ValueError(f"{name}: got dtype {cu_seqlens.dtype}; supported: torch.int32")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{name}: got shape {list(cu_seqlens.shape)}; supported: [B + 1]")
        if cu_seqlens.device != q.device:
            raise ValueError(
                f"{name}: is on {cu_seqlens.device}; supported: q's device, {q.device}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: got shape {list(cu_seqlens_k.shape)}; supported: cu_seqlens_q's, "
            f"{list(cu_seqlens_q.shape)}"
        )


def check_options(
    q: Tensor,
    batch: int,
    dropout_p: float,
    softmax_scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; supported: at least 0 and less than 1")
    if not 0.0 <= softmax_scale <= _LARGEST:
        raise ValueError(
            f"softmax_scale: got {softmax_scale}; supported: at least 0, finite in float32"
        )
    if not 0.0 <= softcap <= _LARGEST:
        raise ValueError(
            f"softcap: got {softcap}; supported: at least 0 (0: no softcap), finite in float32"
        )
    if alibi_slopes is not None:
        heads = q.shape[-2]
        if alibi_slopes.dtype != torch.float32:
            raise ValueError(
                f"alibi_slopes: got dtype {alibi_slopes.dtype}; supported: torch.float32"
            )
        if alibi_slopes.shape != (heads,) and alibi_slopes.shape != (batch, heads):
            raise ValueError(
                f"alibi_slopes: got shape {list(alibi_slopes.shape)}; supported: [{heads}] or "
                f"[{batch}, {heads}]"
            )
        if alibi_slopes.device != q.device:
            raise ValueError(
                f"alibi_slopes: is on {alibi_slopes.device}; supported: q's device, {q.device}"
            )
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "alibi_slopes: requires grad, and has no gradient here; supported: a tensor that "
                "does not, alibi_slopes.detach()"
            )


def window_limits(
    window_size: tuple[int, int], causal: bool, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[int, int]:
    """How many keys a query sees before and after its position; -1: all that there are.

    A limit that hides nothing is none: it costs no mask, backends without windows can take the
    call, and nothing is added to it that might overflow.
    """
    left, right = window_size
    if left < 0 or left >= max_seqlen_k - 1:
        left = -1
    if causal:
        return left, 0
    return left, -1 if right < 0 or right >= max_seqlen_q - 1 else right
