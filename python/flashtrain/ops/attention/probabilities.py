"""The attention probabilities that return_attn_probs asks for, for tests and debugging."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from flashtrain.ops.attention.external import Call
from flashtrain.ops.reference.attention import attention_keep_mask, attention_scores


def signed_probabilities(
    q: Tensor, k: Tensor, lse: Tensor, rng_state: Tensor | None, call: Call
) -> Tensor:
    """exp(scores - lse) in q's dtype, negative where dropout drops; empty without dropout.

    [B, H, Sq, Sk]; with cu_seqlens padded by zeros to [B, H, max_seqlen_q, max_seqlen_k]. Copies
    cu_seqlens and rng_state to the host.
    """
    if rng_state is None:
        return q.new_empty(0)
    if q.is_meta or is_fake(q):
        batch = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
        return q.new_empty(batch, q.shape[-2], call.max_seqlen_q, call.max_seqlen_k)
    with torch.no_grad():
        if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
            return _one_batch(q, k, lse, rng_state, call, call.alibi_slopes, 0)
        bounds_q, bounds_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        padded = []
        for b in range(len(bounds_q) - 1):
            rows_q, rows_k = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
            slopes = call.alibi_slopes
            if slopes is not None and slopes.dim() == 2:
                slopes = slopes[b]
            one = _one_batch(
                q[None, rows_q], k[None, rows_k], lse[None, :, rows_q], rng_state, call, slopes,
                rows_q.start,
            )  # fmt: skip
            missing_q = call.max_seqlen_q - one.shape[-2]
            missing_k = call.max_seqlen_k - one.shape[-1]
            padded.append(F.pad(one, (0, missing_k, 0, missing_q)))
        return torch.cat(padded)


def _one_batch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    call: Call,
    alibi_slopes: Tensor | None,
    first_row: int,
) -> Tensor:
    scores = attention_scores(
        q.float(),
        k.float(),
        softmax_scale=call.softmax_scale,
        window_size=(call.window_left, call.window_right),
        softcap=call.softcap,
        alibi_slopes=alibi_slopes,
    )
    # A query that sees no key: exp(-inf - inf) = 0.
    shift = torch.where(lse == -torch.inf, torch.inf, lse)
    probabilities = torch.exp(scores - shift[..., None])
    batch, seqlen_q, num_heads, _ = q.shape
    keep = attention_keep_mask(
        rng_state, batch, num_heads, seqlen_q, k.shape[1], call.dropout_p, first_row
    )
    return torch.where(keep != 0, probabilities, -probabilities).to(q.dtype)
