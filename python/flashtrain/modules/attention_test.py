"""Multi-head attention, plain and fused, against its formula: one head and one query at a time."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.modules.attention import Context, KVCache, MultiHeadAttention, alibi_slopes
from flashtrain.ops.reference.rotary import apply_rotary_emb, rotary_tables
from flashtrain.ops.reference.sequences import sequence_ids

D_MODEL, HEADS = 24, 3

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "causal": {"causal": True},
    "scaled": {"causal": True, "softmax_scale": 0.7},
    "window": {"window": (2, 1)},
    "left_window": {"window": (2, -1)},
    "causal_window": {"causal": True, "window": (2, -1)},
    "alibi": {"alibi": True},
    "causal_alibi": {"causal": True, "alibi": True, "window": (3, 0)},
    "multi_query": {"num_kv_heads": 1, "causal": True},
    "no_bias": {"bias": False},
}
paths = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def attention(**options: Any) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(D_MODEL, HEADS, **options)


def reference(
    module: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor, documents: list[int] | None = None
) -> Tensor:
    """fp64 [T, D] of one sequence: q [T, H, K], k and v [S, G, K]; documents give each token's."""
    queries, keys = len(q), len(k)
    out = torch.zeros(queries, HEADS, module.head_dim, dtype=torch.float64)
    slopes = alibi_slopes(HEADS).double() if module.alibi else torch.zeros(HEADS)
    for head in range(HEADS):
        group = head * module.num_kv_heads // HEADS
        for t in range(queries):
            here = t + keys - queries
            left, right = module.window
            seen = [
                s
                for s in range(keys)
                if (not module.causal or s <= here)
                and (left < 0 or here - s <= left)
                and (module.causal or right < 0 or s - here <= right)
                and (documents is None or documents[s] == documents[t])
            ]
            scores = module.softmax_scale * k[seen, group] @ q[t, head]
            scores = scores - slopes[head] * torch.tensor([abs(here - s) for s in seen])
            out[t, head] = torch.softmax(scores, 0) @ v[seen, group]
    return out.flatten(1)


def packed_reference(
    module: MultiHeadAttention, x: Tensor, documents: list[int] | None = None
) -> Tensor:
    """fp64 [T, D] of one sequence [T, D]."""
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    qkv = F.linear(x.double(), weights["qkv.weight"], weights.get("qkv.bias"))
    heads = (HEADS, module.num_kv_heads, module.num_kv_heads)
    q, k, v = qkv.unflatten(-1, (-1, module.head_dim)).split(heads, dim=-2)
    y = reference(module, q, k, v, documents)
    return F.linear(y, weights["out.weight"], weights.get("out.bias"))


@paths
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_its_formula(options, fused):
    module = attention(**options, fused=fused)
    x = torch.randn(2, 7, D_MODEL)
    expected = torch.stack([packed_reference(module, row) for row in x])
    torch.testing.assert_close(module(x).double(), expected, rtol=0, atol=1e-5)


@paths
@pytest.mark.parametrize("name", ["default", "causal", "causal_alibi", "multi_query"])
def test_sequences_see_themselves_alone(name, fused):
    """Packed in rows of one length, and all in one row."""
    module = attention(**OPTIONS[name], fused=fused)
    x = torch.randn(2, 6, D_MODEL)
    cu_seqlens = torch.tensor([0, 2, 2, 6, 11, 12, 12], dtype=torch.int32)
    documents = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]
    expected = packed_reference(module, x.flatten(0, 1), documents)
    for rows in (x, x.flatten(0, 1)[None]):
        y = module(rows, context=Context(cu_seqlens=cu_seqlens, max_seqlen=6))
        assert y.shape == rows.shape
        torch.testing.assert_close(y.double().reshape(12, -1), expected, rtol=0, atol=1e-5)
    ids = sequence_ids(cu_seqlens, 12)
    assert ids.unique_consecutive(return_inverse=True)[1].tolist() == documents


@paths
def test_cross_attention_reads_the_other_sequence(fused):
    module = attention(cross=True, fused=fused)
    x, other = torch.randn(2, 5, D_MODEL), torch.randn(2, 9, D_MODEL)
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    rows = []
    for row, read in zip(x.double(), other.double(), strict=True):
        q = F.linear(row, weights["q.weight"], weights["q.bias"]).unflatten(-1, (HEADS, -1))
        kv = F.linear(read, weights["kv.weight"], weights["kv.bias"]).unflatten(-1, (2, HEADS, -1))
        y = reference(module, q, kv[:, 0], kv[:, 1])
        rows.append(F.linear(y, weights["out.weight"], weights["out.bias"]))
    torch.testing.assert_close(module(x, other).double(), torch.stack(rows), rtol=0, atol=1e-5)


@paths
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotary_depends_on_distance_only(per_row, interleaved, fused):
    module = attention(causal=True, rotary_interleaved=interleaved, fused=fused)
    x = torch.randn(2, 7, D_MODEL)

    def run(first: int) -> Tensor:
        positions = torch.arange(first, first + 7)
        if per_row:  # the second row may be elsewhere
            positions = torch.stack([positions, positions + 11])
        return module(x, context=Context(rotary=rotary_tables(positions, 6, 100.0)))

    unrotated = module(x)
    torch.testing.assert_close(run(0), run(1000), rtol=0, atol=2e-5)
    assert (run(0) - unrotated).abs().max() > 1e-2
    torch.testing.assert_close(run(0)[:, 0], unrotated[:, 0], rtol=0, atol=2e-5)


def test_rotation_is_by_the_angle():
    x = torch.zeros(1, 4, 1, 6)
    x[..., 0] = x[..., 4] = x[..., 5] = 1.0
    for interleaved, partner in ((False, 2), (True, 1)):
        cos, sin = rotary_tables(torch.arange(4), 4, 10.0)
        y = apply_rotary_emb(x, cos, sin, interleaved)
        for t in range(4):
            assert y[0, t, 0, 0].item() == pytest.approx(math.cos(t), abs=1e-6)
            assert y[0, t, 0, partner].item() == pytest.approx(math.sin(t), abs=1e-6)
        assert (y[..., 4:] == 1.0).all()
        assert (y.norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-6


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    twelve = alibi_slopes(12).tolist()
    assert twelve[:8] == [2.0**-i for i in range(1, 9)]
    assert twelve[8:] == pytest.approx([2.0 ** -(i + 0.5) for i in range(4)])


@paths
def test_a_cache_gives_what_one_call_gives(fused):
    module = attention(causal=True, fused=fused).eval()
    x = torch.randn(2, 7, D_MODEL)
    expected = module(x)
    cache = KVCache(2, 9, HEADS, module.head_dim, device=x.device, dtype=x.dtype)
    parts = [module(x[:, :4], cache=cache)]
    for t in range(4, 7):
        mask = torch.ones(1, 1, 1, t + 1, dtype=torch.bool)
        parts.append(module(x[:, t : t + 1], context=Context(mask=mask), cache=cache))
    assert cache.length == 7
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


@paths
def test_dropout_acts_on_weights_in_training_only(fused):
    module = attention(dropout_p=0.5, fused=fused)
    x = torch.randn(1, 5, D_MODEL)
    assert not torch.equal(module(x), module(x))
    module.eval()
    expected = packed_reference(module, x[0])
    torch.testing.assert_close(module(x)[0].double(), expected, rtol=0, atol=1e-5)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="d_model=10 is not a multiple of num_heads=3"):
        MultiHeadAttention(10, 3)
    with pytest.raises(ValueError, match="num_heads=3 is not a multiple of num_kv_heads=2"):
        MultiHeadAttention(9, 3, num_kv_heads=2)
