"""RotaryEmbedding: its tables, context extension and XPos, against other libraries' formulas."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from flashtrain.ops import rotary
from flashtrain.ops.rotary import RotaryEmbedding, scaling
from flashtrain.testing.devices import DEVICE

BASE = 10000.0


def randn(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, device=DEVICE)


def scores(rotated: Tensor) -> Tensor:
    """Products of all queries and keys, [B, H, S, S]."""
    q, k, _ = rotated.unbind(2)
    return torch.einsum("bshd,bthd->bhst", q, k)


# --- The plain module -----------------------------------------------------------------------------


def test_against_transformers() -> None:
    """GPT-NeoX's style is Llama's."""
    qkv = randn(2, 9, 3, 4, 32)
    inverse = 1.0 / BASE ** (torch.arange(0, 32, 2, device=DEVICE) / 32)
    angles = torch.outer(torch.arange(9.0, device=DEVICE), inverse).repeat(1, 2)[None]
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    q, k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    expected = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)
    torch.testing.assert_close(RotaryEmbedding(32)(qkv.clone()), expected)


def test_interleaved_is_the_other_order_of_elements() -> None:
    qkv = randn(2, 9, 3, 4, 32)
    order = torch.arange(32).view(2, 16).t().flatten()  # pairs (i, 16 + i) side by side
    out = RotaryEmbedding(32, interleaved=True)(qkv[..., order].clone())
    torch.testing.assert_close(out, RotaryEmbedding(32)(qkv.clone())[..., order])


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_scores_depend_on_distance_alone(scale_base: float | None) -> None:
    module = RotaryEmbedding(32, scale_base=scale_base)
    qkv = randn(1, 1, 3, 2, 64).expand(1, 50, 3, 2, 64)
    out = scores(module(qkv.clone()))
    for distance in (-7, 0, 20):
        diagonal = out.diagonal(distance, 2, 3)
        torch.testing.assert_close(
            diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-4, atol=1e-4
        )
    shifted = scores(module(qkv.clone(), seqlen_offset=31))
    torch.testing.assert_close(out, shifted, rtol=1e-4, atol=1e-4)


def test_xpos_decays_with_distance() -> None:
    """Section 2.2 of the paper: q's scale by k's is decay**(distance / scale_base)."""
    dim, scale_base, length = 16, 64.0, 40
    qkv = randn(1, 1, 3, 1, dim).expand(1, length, 3, 1, dim)
    out = scores(RotaryEmbedding(dim, scale_base=scale_base)(qkv.clone()))[0, 0]
    q, k = qkv[0, 0, 0, 0].double(), qkv[0, 0, 1, 0].double()
    i = torch.arange(dim // 2, device=DEVICE, dtype=torch.float64)
    decay, frequency = (2 * i + 0.4 * dim) / (1.4 * dim), BASE ** (-2 * i / dim)
    a, b = torch.complex(*q.chunk(2)), torch.complex(*k.chunk(2))
    for s, t in ((0, 0), (30, 2), (5, 39)):
        turned = a * b.conj() * torch.polar(decay ** ((s - t) / scale_base), frequency * (s - t))
        torch.testing.assert_close(out[s, t].double(), turned.real.sum(), rtol=1e-4, atol=1e-4)


def test_queries_and_keys_apart() -> None:
    module = RotaryEmbedding(16, scale_base=512.0)
    q, kv = randn(2, 7, 4, 32), randn(2, 7, 2, 2, 32)
    packed = torch.cat([q, kv[:, :, 0], kv[:, :, 1]], 2)
    expected = module(packed, seqlen_offset=3, num_heads_q=4)
    rotated_q, rotated_kv = module(q, kv, seqlen_offset=3)
    assert rotated_q is q or rotated_q.data_ptr() == q.data_ptr()
    together = torch.cat([rotated_q, rotated_kv[:, :, 0], rotated_kv[:, :, 1]], 2)
    assert torch.equal(together, expected)


def test_positions() -> None:
    module = RotaryEmbedding(16)
    qkv = randn(2, 7, 3, 2, 32)
    expected = module(qkv.clone(), seqlen_offset=4)
    offsets = torch.tensor([4, 4], device=DEVICE)
    ids = torch.arange(4, 11, device=DEVICE)
    assert torch.equal(module(qkv.clone(), seqlen_offset=offsets, max_seqlen=11), expected)
    assert torch.equal(module(qkv.clone(), position_ids=ids, max_seqlen=11), expected)
    cu_seqlens = torch.tensor([0, 7, 14], device=DEVICE)
    flat = module(qkv.clone().flatten(0, 1), seqlen_offset=4, cu_seqlens=cu_seqlens, max_seqlen=11)
    assert torch.equal(flat.view_as(expected), expected)


def test_tables_grow_and_stay() -> None:
    module = RotaryEmbedding(8, device=DEVICE)
    tables = []
    for length in (5, 3, 6, 10, 11):
        module(randn(1, length, 3, 1, 8))
        assert module._tables is not None
        tables.append(module._tables[0])
        assert len(tables[-1]) >= length
    assert tables[1] is tables[0]
    assert tables[3] is tables[2]  # 10 positions, as 5 doubled
    assert torch.equal(tables[-1][:5], tables[0][:5])
    assert not module.state_dict()
    assert list(module.parameters()) == []


def test_bfloat16_modules_keep_exact_tables() -> None:
    module = RotaryEmbedding(32).to(torch.bfloat16)
    qkv = randn(1, 4, 3, 1, 32).to(torch.bfloat16)
    out = module(qkv.clone(), seqlen_offset=100_000)
    exact = RotaryEmbedding(32)(qkv.float(), seqlen_offset=100_000)
    assert torch.equal(out, exact.to(torch.bfloat16))
    angle = 100_003 * BASE ** -(2 / 32)
    assert module._tables is not None
    assert module._tables[1][100_003, 1].item() == pytest.approx(math.sin(angle), abs=1e-7)


# --- Tables and what they were made under ---------------------------------------------------------


def _gradient(module: RotaryEmbedding, length: int = 4) -> Tensor:
    x = randn(1, length, 3, 1, 8).requires_grad_()
    module(x * 1).square().mul(randn(1, length, 3, 1, 8)).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    "enter",
    [torch.inference_mode, torch.no_grad, FakeTensorMode, lambda: torch.device("meta")],
    ids=["inference", "no_grad", "fake", "meta"],
)
@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_training_after_a_mode(
    enter: Callable[[], contextlib.AbstractContextManager], scale_base: float | None
) -> None:
    """Dao-AILab/flash-attention#299: a module first called under some mode, then trained."""
    module = RotaryEmbedding(8, scale_base=scale_base)
    with enter():
        module(torch.zeros(1, 6, 3, 1, 8))
    fresh = _gradient(RotaryEmbedding(8, scale_base=scale_base))
    assert torch.equal(_gradient(module), fresh)
    with enter():  # and back, with tables that were made outside
        out = module(torch.zeros(1, 5, 3, 1, 8))
        assert isinstance(out, FakeTensor) == (enter is FakeTensorMode)
        module(torch.zeros(1, 99, 3, 1, 8))
    assert torch.equal(_gradient(module), fresh)


def test_tables_made_for_a_default_device_or_dtype() -> None:
    expected = RotaryEmbedding(8, scaling=scaling.YarnScaling(2.0))(randn(1, 5, 3, 1, 8))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            module = RotaryEmbedding(8, scaling=scaling.YarnScaling(2.0))
        qkv = randn(1, 5, 3, 1, 8).float()
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        out = module(qkv)
    assert out.shape == expected.shape
    torch.testing.assert_close(out.norm(), qkv.norm())


def test_copies_pickles_and_moves() -> None:
    module = RotaryEmbedding(8, scale_base=512.0)
    expected = _gradient(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert other._tables is None
        assert torch.equal(_gradient(other), expected)
    assert torch.equal(_gradient(module.half().double()), expected)
    assert torch.equal(_gradient(module.to("meta").to_empty(device=DEVICE)), expected)


def test_tables_of_other_devices_are_kept() -> None:
    module = RotaryEmbedding(8)
    module(randn(1, 6, 3, 1, 8))
    tables = module._tables
    assert tables is not None
    module.extend_tables(9, "meta")
    assert module._tables is tables
    module(randn(1, 20, 3, 1, 8))
    assert module._kept[tables.cos.device][0] is tables


def test_xpos_does_not_depend_on_the_length_of_tables() -> None:
    """lucidrains/rotary-embedding-torch#27: prefill, then decode, with keys kept."""
    qkv = randn(1, 24, 3, 1, 8)
    for scale_base in (16.0, 512.0):
        whole = RotaryEmbedding(8, scale_base=scale_base)(qkv.clone())
        module, parts, past = RotaryEmbedding(8, scale_base=scale_base), [], 0
        for count in (16, *[1] * 8):
            part = qkv[:, past : past + count].clone()
            parts.append(module(part, seqlen_offset=past))
            past += count
        assert torch.equal(torch.cat(parts, 1), whole)


def test_xpos_of_far_positions() -> None:
    """Scales are finite to where float32 ends, and an error says so beyond it."""
    module = RotaryEmbedding(64, scale_base=512.0)
    qkv = randn(1, 2, 3, 1, 64)
    near = scores(module(qkv.clone()))
    far = scores(module(qkv.clone(), seqlen_offset=36_000))
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)
    module(qkv.clone(), seqlen_offset=36_500)  # tables are not doubled to where they overflow
    message = r"scale_base: got 512\.0 with 40002 positions, .*; supported: at most 36580 positions"
    with pytest.raises(ValueError, match=message):
        module(qkv.clone(), seqlen_offset=40_000)
    RotaryEmbedding(64, scale_base=4096.0)(qkv, seqlen_offset=200_000)


def test_names_that_code_for_flash_attn_reads() -> None:
    module = RotaryEmbedding(16)
    expected = 1.0 / BASE ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(module.inv_freq, expected)
    assert module._cos_cached is module._sin_cached is module.scale is None
    assert module._seq_len_cached == 0
    module._update_cos_sin_cache(9, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.outer(torch.arange(9.0), expected).to(DEVICE)
    for table, value in ((module._cos_cached, angles.cos()), (module._sin_cached, angles.sin())):
        assert table is not None
        torch.testing.assert_close(table, value.bfloat16())
    assert module._seq_len_cached == 9
    assert module._cos_k_cached is module._sin_k_cached is None
    assert module.inv_freq.device.type == DEVICE.type
    module._update_cos_sin_cache(5)
    assert module._seq_len_cached == 9
    xpos = RotaryEmbedding(16, scale_base=512.0, device=DEVICE)
    assert xpos.scale is not None
    torch.testing.assert_close(xpos.scale.cpu(), (torch.arange(0, 16, 2) + 6.4) / 22.4)
    for table in (xpos._cos_k_cached, xpos._sin_k_cached):
        assert table is not None
        assert table.dtype == torch.float32
    assert rotary.apply_rotary_emb_func is rotary.apply_rotary_emb


@pytest.mark.parametrize("name", ["base", "scale_base"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_numbers_that_make_no_tables(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got {value}; supported: greater than 0, fin"):
        RotaryEmbedding(8, **{name: value})  # type: ignore[arg-type]


# --- Context extension ----------------------------------------------------------------------------


def _transformers(rope: dict, dim: int, max_position: int) -> tuple[Tensor, float]:
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=max_position,
        rope_parameters={"rope_theta": BASE, **rope},
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies.double(), factor


_EXTENSIONS = {
    "linear": (scaling.LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        scaling.YarnScaling(8.0, original_max_position=2048),
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048},
    ),
    "yarn, all options": (
        scaling.YarnScaling(
            4.0, original_max_position=512, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3
        ),
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3,
        },
    ),
    "llama3": (
        scaling.Llama3Scaling(8.0, original_max_position=8192),
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    ),
    "llama3, all options": (
        scaling.Llama3Scaling(
            32.0, original_max_position=1024, low_freq_factor=2.0, high_freq_factor=16.0
        ),
        {
            "rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 1024,
            "low_freq_factor": 2.0, "high_freq_factor": 16.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _EXTENSIONS)
@pytest.mark.parametrize("dim", [64, 128])
def test_frequencies_against_transformers(name: str, dim: int) -> None:
    ours, theirs = _EXTENSIONS[name]
    frequencies, factor = _transformers(theirs, dim, 65536)
    torch.testing.assert_close(ours.frequencies(dim, BASE), frequencies, rtol=2e-6, atol=0.0)
    assert ours.table_factor == pytest.approx(factor)


def test_ntk_stretches_the_slowest_pair_by_the_factor() -> None:
    plain = scaling.frequencies(64, BASE)
    stretched = scaling.NTKScaling(4.0).frequencies(64, BASE)
    assert stretched[0] == plain[0] == 1.0
    torch.testing.assert_close(stretched[-1], plain[-1] / 4.0)
    ratio = plain / stretched
    assert (ratio.diff() > 0).all()
    assert scaling.NTKScaling(4.0).frequencies(2, BASE).tolist() == [1.0]


@pytest.mark.parametrize("name", _EXTENSIONS)
def test_module_uses_them(name: str) -> None:
    extension, _ = _EXTENSIONS[name]
    qkv = randn(1, 30, 3, 2, 64)
    out = RotaryEmbedding(64, scaling=extension)(qkv.clone())
    angles = torch.outer(torch.arange(30, dtype=torch.float64), extension.frequencies(64, BASE)).to(
        DEVICE
    )[:, None]
    a, b = qkv[:, :, 0].double().chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], -1) * extension.table_factor
    torch.testing.assert_close(out[:, :, 0], expected.float())
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])


def test_factor_1_changes_nothing() -> None:
    plain = scaling.frequencies(64, BASE)
    for extension in (
        scaling.RotaryScaling(), scaling.LinearScaling(1.0), scaling.NTKScaling(1.0),
        scaling.YarnScaling(1.0), scaling.Llama3Scaling(1.0),
    ):  # fmt: skip
        torch.testing.assert_close(extension.frequencies(64, BASE), plain)
        assert extension.table_factor == 1.0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"factor: got 0\.5; supported: at least 1"):
        scaling.LinearScaling(0.5)
    with pytest.raises(
        ValueError, match=r"high_freq_factor: got 1\.0; supported: greater than low"
    ):
        scaling.Llama3Scaling(8.0, high_freq_factor=1.0)
    with pytest.raises(ValueError, match=r"original_max_position: got 0; supported: at least 1"):
        scaling.YarnScaling(8.0, original_max_position=0)
    with pytest.raises(TypeError, match="scaling: got dict; supported: RotaryScaling or None"):
        RotaryEmbedding(8, scaling={"type": "linear"})  # type: ignore[arg-type]
