"""Random calls of attention's four functions; see flashtrain.testing.fuzz."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtrain.ops import attention
from flashtrain.ops.reference.attention import attention as reference_attention
from flashtrain.testing.devices import DEVICE
from flashtrain.testing.fuzz import FLOATS, Call, Expected, spoiled, tensor


class _Reference:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of tensors that are float64 in the arguments

    def one(self, a: dict, q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None) -> Tensor:
        options = ("softmax_scale", "causal", "window_size", "softcap")
        given = {n: a[n] for n in options} | {"window_size": tuple(a["window_size"])}
        out, _ = reference_attention(
            q, k, v, **given, alibi_slopes=alibi, compute_dtype=torch.float64
        )
        return out

    def __call__(self, a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
        q, k, v = _unpacked(a)
        dtype = self.dtype if q.dtype == torch.float64 else q.dtype
        scale = a["softmax_scale"]
        if scale is not None:  # an array or sparse tensor is a number to the op, and not to torch
            scale = float(scale)
            a = a | {"softmax_scale": scale}
        if q.is_meta or a["dropout_p"] > 0.0 or not a["softcap"] < 1e6 or (scale or 1.0) > 1e3:
            return [Expected(q.to("meta"), dtype)]
        assert k.shape == v.shape
        alibi = a["alibi_slopes"]
        if "cu_seqlens_q" not in a:
            assert alibi is None or alibi.shape[-1] == q.shape[2]
            return [Expected(self.one(a, q, k, v, alibi), dtype)]
        bounds_q, bounds_k = a["cu_seqlens_q"].tolist(), a["cu_seqlens_k"].tolist()
        assert len(bounds_q) == len(bounds_k)
        for bounds, rows in ((bounds_q, q.shape[0]), (bounds_k, k.shape[0])):
            assert bounds == sorted(bounds)
            assert bounds[0] == 0
            assert bounds[-1] == rows
        parts = [q.double()[:0]]
        for i in range(len(bounds_q) - 1):
            rows, keys = (slice(b[i], b[i + 1]) for b in (bounds_q, bounds_k))
            slopes = alibi if alibi is None or alibi.dim() == 1 else alibi[i : i + 1]
            parts.append(self.one(a, q[None, rows], k[None, keys], v[None, keys], slopes)[0])
        return [Expected(torch.cat(parts), dtype)]


def _unpacked(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    if "qkv" in a:
        return a["qkv"].unbind(2)
    if "kv" in a:
        return a["q"], *a["kv"].unbind(2)
    return a["q"], a["k"], a["v"]


def _options(rng: random.Random, heads: int) -> dict[str, Any]:
    alibi = torch.rand(heads, device=DEVICE) if rng.random() < 0.3 else None
    window = tuple(rng.choice((-1, -1, 0, 2, 3, -9, 2**31 - 1, 2**62)) for _ in range(2))
    causal = rng.random() < 0.5
    return {
        "dropout_p": rng.choice((0.0, 0.0, 0, 0.2)),
        "softmax_scale": rng.choice((None, 0.3, 0.0, 1, np.float32(0.25), torch.tensor(0.5))),
        "causal": rng.choice((causal, int(causal), np.bool_(causal))),
        "window_size": rng.choice((window, list(window))),
        "softcap": rng.choice((0.0, 0.0, 5.0)), "alibi_slopes": alibi,
        "deterministic": rng.random() < 0.2,
    }  # fmt: skip


def _varlen(rng: random.Random, arguments: dict[str, Any], draw_tensor: Any) -> None:
    batch = rng.choice((0, 1, 2, 3))
    for side in "qk":
        lengths = [rng.randrange(5) for _ in range(batch)]
        bounds = [sum(lengths[:i]) for i in range(batch + 1)]
        arguments[f"cu_seqlens_{side}"] = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        longest = max(lengths, default=0)
        arguments[f"max_seqlen_{side}"] = rng.choice(
            (longest, longest, longest + 1, 2**31 - 1, 2**62, np.int64(longest))
        )
        for name in ("q",) if side == "q" else ("k", "v"):
            arguments[name] = draw_tensor((bounds[-1],), name)


def draw(rng: random.Random) -> Call:
    function = rng.choice(
        (
            attention.flash_attn_func,
            attention.flash_attn_kvpacked_func,
            attention.flash_attn_qkvpacked_func,
            attention.flash_attn_varlen_func,
            attention.flash_attn_varlen_func,
        )
    )
    dtype, dim = rng.choice(FLOATS), rng.choice((1, 4, 8, 24))
    heads_k = rng.choice((1, 2))
    heads = heads_k * rng.choice((1, 2, 3))
    batch, length_q, length_k = (rng.choice((0, 1, 2, 3, 6)) for _ in range(3))

    def draw_tensor(tokens: tuple[int, ...], name: str) -> Tensor:
        shape = (*tokens, heads if name in ("q", "qkv") else heads_k, dim)
        return tensor(rng, shape, dtype, rng.random() < 0.7)

    arguments: dict[str, Any] = {}
    if function is attention.flash_attn_varlen_func:
        _varlen(rng, arguments, draw_tensor)
    elif function is attention.flash_attn_qkvpacked_func:
        arguments["qkv"] = draw_tensor((batch, length_q, 3), "qkv")
    else:
        arguments["q"] = draw_tensor((batch, length_q), "q")
        if function is attention.flash_attn_func:
            arguments |= {name: draw_tensor((batch, length_k), name) for name in ("k", "v")}
        else:
            arguments["kv"] = draw_tensor((batch, length_k, 2), "kv")
    arguments |= _options(rng, heads)
    return spoiled(rng, Call(function, arguments, _Reference(dtype)))
