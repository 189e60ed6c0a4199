"""Attention of other libraries behind one signature: cuDNN and FlashAttention of torch, flash_attn.

Each takes q, k, v as flashtrain.ops.attention does and a `Call`, and returns out; autograd is the
library's own. What each supports is in dispatch.py, and must be checked before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """Arguments of a call except q, k and v. Window sizes are -1 where there is no limit."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Tensor | None
    dropout_p: float
    deterministic: bool


def _is_causal(call: Call) -> bool:
    return call.window_left < 0 and call.window_right == 0


def cudnn(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """cuDNN's fused attention, as torch.nn.functional.scaled_dot_product_attention calls it.

    The op itself, and not that function inside sdpa_kernel(CUDNN_ATTENTION), whose context manager
    costs tens of microseconds a call.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        None,
        needs_grad,
        call.dropout_p,
        _is_causal(call),
        False,
        scale=call.softmax_scale,
    )[0]
    return out.transpose(1, 2)


def torch_flash(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """FlashAttention-2 as it is part of torch."""
    causal = _is_causal(call)
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.dropout_p,
        causal,
        False,
        scale=call.softmax_scale,
        window_size_left=None if causal else call.window_left,
        window_size_right=None if causal else call.window_right,
    )[0]


def _varlen_arguments(call: Call) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.cu_seqlens_q,
        "cu_seqlens_k": call.cu_seqlens_k,
        "max_seqlen_q": call.max_seqlen_q,
        "max_seqlen_k": call.max_seqlen_k,
    }


def _common_arguments(call: Call) -> dict[str, Any]:
    """What flash_attn 2, 3 and 4 all take by these names."""
    return {
        "softmax_scale": call.softmax_scale,
        "causal": _is_causal(call),
        "softcap": call.softcap,
        "deterministic": call.deterministic,
    }


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Package flash-attn 2."""
    import flash_attn

    arguments = _common_arguments(call) | {
        "window_size": (call.window_left, call.window_right),
        "alibi_slopes": call.alibi_slopes,
        "dropout_p": call.dropout_p,
    }
    if call.cu_seqlens_q is None:
        return flash_attn.flash_attn_func(q, k, v, **arguments)
    return flash_attn.flash_attn_varlen_func(q, k, v, **_varlen_arguments(call), **arguments)


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Versions of flash_attn 3 and 4 return the log-sum-exp too, or do not."""
    return result[0] if isinstance(result, tuple) else result


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Package flash-attn-3 (module flash_attn_interface)."""
    import flash_attn_interface

    arguments = _common_arguments(call) | {"window_size": (call.window_left, call.window_right)}
    if call.cu_seqlens_q is None:
        return _output(flash_attn_interface.flash_attn_func(q, k, v, **arguments))
    return _output(
        flash_attn_interface.flash_attn_varlen_func(q, k, v, **_varlen_arguments(call), **arguments)
    )


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Package flash-attn-4 (module flash_attn.cute)."""
    from flash_attn import cute

    sizes = (call.window_left, call.window_right)
    window: tuple[int | None, ...] = (None, None)
    if not _is_causal(call):
        window = tuple(None if size < 0 else size for size in sizes)
    arguments = _common_arguments(call) | {"window_size": window}
    if call.cu_seqlens_q is None:
        return _output(cute.flash_attn_func(q, k, v, **arguments))
    return _output(cute.flash_attn_varlen_func(q, k, v, **_varlen_arguments(call), **arguments))


PEERS = {
    "cudnn": cudnn,
    "torch_flash": torch_flash,
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "flash_attn_4": flash_attn_4,
}
