"""rotary against its reference: shapes, dtypes, layouts, positions, by the two-sided rule."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.ops import rotary
from flashtrain.ops.reference import rotary as reference
from flashtrain.ops.rotary.cases import (
    BF16,
    FP16,
    FP32,
    TABLE_LEN,
    Case,
    expect,
    positions_of,
)
from flashtrain.testing.devices import DEVICE, needs_gpu_memory, poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


def check(case: Case, **options) -> None:
    """apply_rotary_emb on the case, out of place and in place."""
    x, tables = case.x(), case.tables()
    cu_seqlens = options.get("cu_seqlens")
    positions = options.get("position_ids")
    if positions is None:
        positions = positions_of(
            case.shape,
            options.get("seqlen_offsets", 0),
            None if cu_seqlens is None else cu_seqlens.tolist(),
        )
    positions = positions.long().expand(case.shape[:-2])
    for inplace in (False, True):
        operand = x * 1 if inplace else x
        out = rotary.apply_rotary_emb(operand, *tables, case.interleaved, inplace, **options)
        assert (out.data_ptr() == operand.data_ptr()) == (inplace or x.numel() == 0)
        expect("x", out, x, tables, positions, case.interleaved)
        rest = slice(case.rotary_dim, None)
        assert torch.equal(out[..., rest], x[..., rest])


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(2, 2), (3, 2), (16, 16), (64, 64), (64, 32), (80, 80), (80, 40), (96, 48), (128, 128),
     (129, 128), (256, 256), (65, 34)],
)  # fmt: skip
def test_head_dims(head_dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    for table in dict.fromkeys((FP32, dtype)):
        check(Case((2, 7, 3, head_dim), rotary_dim, dtype, table, interleaved))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 64), (0, 5, 2, 64), (2, 0, 2, 64), (2, 5, 0, 64), (1, 33, 1, 64), (3, 17, 12, 64),
     (1, 2, 130, 64), (40, 3, 5, 64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Case(shape, dtype=dtype))


def test_real_angles_turn_pairs_and_keep_lengths() -> None:
    x = torch.randn(1, 9, 2, 32, device=DEVICE)
    angles = torch.outer(torch.arange(9.0), 10000.0 ** -(torch.arange(0, 32, 2) / 32)).to(DEVICE)
    out = rotary.apply_rotary_emb(x, angles.cos(), angles.sin())
    a, b = x.double().chunk(2, -1)
    turned = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    expected = torch.complex(a, b) * turned
    torch.testing.assert_close(out, torch.cat([expected.real, expected.imag], -1).float())
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[:, 0], x[:, 0])


def test_reference_passes_gradcheck() -> None:
    case = Case((2, 3, 2, 8), 6, torch.float64, torch.float64)
    positions = positions_of(case.shape, 4)
    for interleaved in (False, True):
        function = functools.partial(reference.apply_rotary_emb, interleaved=interleaved)
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(x, *case.tables(), position_ids=positions), case.x()
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_pair(value: float) -> None:
    case = Case((2, 5, 2, 16), 8)
    x = case.x().detach()
    x[1, 2, 1, 3] = value
    out = rotary.apply_rotary_emb(x, *case.tables())
    bad = ~out.isfinite()
    assert bad.nonzero().tolist() == [[1, 2, 1, 3], [1, 2, 1, 7]]


# --- Positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_offsets(index: torch.dtype) -> None:
    check(Case(), seqlen_offsets=TABLE_LEN - 7)
    offsets = torch.tensor([11, 0], device=DEVICE, dtype=index)
    check(Case(), seqlen_offsets=offsets)
    check(Case(interleaved=True, dtype=FP32), seqlen_offsets=offsets)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "cu_seqlens", [[0, 20], [0, 3, 3, 4, 20], [0, 0, 20], [0, 20, 20], list(range(21))], ids=str
)
def test_sequences(cu_seqlens: list[int], index: torch.dtype) -> None:
    cu = torch.tensor(cu_seqlens, device=DEVICE, dtype=index)
    case = Case((20, 3, 64))
    check(case, cu_seqlens=cu)
    check(case, cu_seqlens=cu, max_seqlen=20, seqlen_offsets=30)
    offsets = torch.arange(len(cu_seqlens) - 1, device=DEVICE)  # int64, whatever cu_seqlens are
    check(case, cu_seqlens=cu, seqlen_offsets=offsets)


def test_tokens_after_the_last_sequence_are_copied() -> None:
    case = Case((9, 2, 16), 16)
    x, tables = case.x(), case.tables()
    cu = torch.tensor([0, 4, 6], device=DEVICE)
    out = rotary.apply_rotary_emb(x, *tables, cu_seqlens=cu)
    expected = rotary.apply_rotary_emb(x[:6], *tables, cu_seqlens=cu)
    assert torch.equal(out[:6], expected)
    assert torch.equal(out[6:], x[6:])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_position_ids(index: torch.dtype) -> None:
    torch.manual_seed(3)
    ids = torch.randint(TABLE_LEN, (2, 7), device=DEVICE).to(index)
    check(Case(), position_ids=ids)
    check(Case(), position_ids=ids[:1])
    check(Case(), position_ids=ids[1])
    check(Case(), position_ids=ids.t().contiguous().t())


@pytest.mark.parametrize("first", [-1, TABLE_LEN - 6, TABLE_LEN, 2**40])
@pytest.mark.parametrize("how", ["int", "offsets", "ids", "sequences"])
def test_positions_outside_the_tables(first: int, how: str) -> None:
    case = Case((2, 7, 3, 64) if how != "sequences" else (14, 3, 64), 32)
    x, tables = case.x().detach(), case.tables()
    options: dict = {"seqlen_offsets": first}
    if how == "offsets":
        options = {"seqlen_offsets": torch.tensor([0, first], device=DEVICE)}
    elif how == "ids":
        ids = positions_of(case.shape).clone()
        ids[1] += first
        options = {"position_ids": ids}
    elif how == "sequences":
        options["cu_seqlens"] = torch.tensor([0, 7, 14], device=DEVICE)
        options["seqlen_offsets"] = torch.tensor([0, first], device=DEVICE)
    if how == "int" or DEVICE.type == "cpu":
        for inplace in (False, True):
            before = x.clone()
            with pytest.raises(ValueError, match="tables"):
                rotary.apply_rotary_emb(x, *tables, inplace=inplace, **options)
            assert torch.equal(x, before)
        return
    out = rotary.apply_rotary_emb(x, *tables, **options).reshape(2, 7, 3, 64)
    outside = torch.tensor([not 0 <= first + i < TABLE_LEN for i in range(7)], device=DEVICE)
    assert outside.any()
    assert out[1, outside, :, :32].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, ~outside].isfinite().all()
    assert torch.equal(out[..., 32:], x.reshape(2, 7, 3, 64)[..., 32:])


# --- Layouts --------------------------------------------------------------------------------------

_LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "of packed qkv": lambda x: torch.stack([x, x, x], 2)[:, :, 1],
    "odd start": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "head dim apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "elements apart": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, rotary_dim=48)
    x, tables = case.x().detach(), case.tables()
    expected = rotary.apply_rotary_emb(x, *tables)
    moved = _LAYOUTS[layout](x).requires_grad_()
    out = rotary.apply_rotary_emb(moved, *tables)
    assert out.is_contiguous()
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    (plain,) = torch.autograd.grad(out, moved, grad, retain_graph=True)
    (of_layout,) = torch.autograd.grad(out, moved, _LAYOUTS[layout](grad))
    assert torch.equal(plain, of_layout)
    moved = moved.detach()
    if layout == "elements apart":
        with pytest.raises(ValueError, match=r"x: got elements 2 apart .*in place: adjacent"):
            rotary.apply_rotary_emb(moved, *tables, inplace=True)
    else:
        rotary.apply_rotary_emb(moved, *tables, inplace=True)
        assert torch.equal(moved, expected)


def test_elements_apart_of_an_empty_tensor() -> None:
    x = torch.zeros(1, 0, 3, 16, 2, device=DEVICE)[..., 0]
    out = rotary.apply_rotary_emb(x, *Case(rotary_dim=16, dtype=FP32).tables())
    assert out.shape == x.shape


def test_expanded_gradient() -> None:
    case = Case(dtype=FP32)
    x, tables = case.x(), case.tables()
    (grad,) = torch.autograd.grad(rotary.apply_rotary_emb(x, *tables).sum(), x)
    out = reference.apply_rotary_emb(x, *tables, position_ids=positions_of(case.shape))
    torch.testing.assert_close(grad, torch.autograd.grad(out.sum(), x)[0])


# --- Packed tensors -------------------------------------------------------------------------------


def _expect_packed(
    out: Tensor,
    x: Tensor,
    leaf: Tensor,
    parts: list[tuple[slice, tuple[Tensor, Tensor] | None]],
    positions: Tensor,
) -> None:
    """Every part [..., heads, D] of out and x, both of leaf, against the reference."""
    for heads, tables in parts:
        name = f"heads {heads.start} to {heads.stop}"
        part, source = out[..., heads, :], x[..., heads, :]
        if tables is None:
            assert torch.equal(part, source), name
            continue
        expected = reference.apply_rotary_emb(source, *tables, position_ids=positions)
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5, msg=name)
        grad = torch.randn(part.shape, device=DEVICE)
        (ours,) = torch.autograd.grad(part, leaf, grad, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, leaf, grad)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_qkv(packed: bool, own_tables: bool, varlen: bool) -> None:
    tokens = (14,) if varlen else (2, 7)
    heads = (3, 4) if packed else (10,)  # 3 x 4, or 4 queries, 3 keys, 3 values
    case = Case((*tokens, *heads, 32), 16, FP32)
    tables = case.tables()
    tables_k = case.tables(seed=5) if own_tables else None
    cos_k, sin_k = tables_k or (None, None)
    cu = torch.tensor([0, 5, 14], device=DEVICE) if varlen else None
    positions = positions_of(case.shape, 2, None if cu is None else cu.tolist())
    leaf = case.x()
    qkv = leaf * 1
    options: dict[str, Any] = {
        "seqlen_offsets": 2, "num_heads_q": None if packed else 4, "cu_seqlens": cu,
    }  # fmt: skip
    out = rotary.apply_rotary_emb_qkv_(qkv, *tables, cos_k, sin_k, **options)
    assert out.data_ptr() == qkv.data_ptr()
    q = 4
    k = q + (4 if packed else 3)
    flat = (len(tokens), len(tokens) + len(heads) - 1)
    parts = [
        (slice(0, q), tables),
        (slice(q, k), tables_k or tables),
        (slice(k, None), None),
    ]
    view = leaf.flatten(*flat) if packed else leaf
    _expect_packed(out.flatten(*flat) if packed else out, view, leaf, parts, positions)


@pytest.mark.parametrize("varlen", [False, True])
def test_kv(varlen: bool) -> None:
    tokens = (14,) if varlen else (2, 7)
    case = Case((*tokens, 2, 3, 32), 32, FP32, interleaved=True)
    cu = torch.tensor([0, 5, 14], device=DEVICE) if varlen else None
    positions = positions_of(case.shape, 0, None if cu is None else cu.tolist())
    leaf = case.x()
    out = rotary.apply_rotary_emb_kv_(leaf * 1, *case.tables(), True, cu_seqlens=cu)
    expected = reference.apply_rotary_emb(
        leaf[..., 0, :, :], *case.tables(), position_ids=positions, interleaved=True
    )
    torch.testing.assert_close(out[..., 0, :, :], expected)
    assert torch.equal(out[..., 1, :, :], leaf[..., 1, :, :])
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, leaf, grad)
    both = torch.stack([expected, leaf[..., 1, :, :]], -3)
    torch.testing.assert_close(ours, torch.autograd.grad(both, leaf, grad)[0])


def test_qkv_of_any_strides() -> None:
    case = Case((2, 7, 3, 4, 32), 32, FP32)
    x = case.x().detach()
    expected = rotary.apply_rotary_emb_qkv_(x.clone(), *case.tables())
    for order in ((2, 0, 1, 3, 4), (0, 3, 2, 1, 4), (3, 2, 1, 0, 4)):
        back = [order.index(i) for i in range(5)]
        moved = x.permute(order).contiguous().permute(back)
        rotary.apply_rotary_emb_qkv_(moved, *case.tables())
        assert torch.equal(moved, expected)


@needs_gpu_memory(30)
def test_more_than_two_to_the_31_elements() -> None:
    case = Case((2**31 // (2048 * 1024) + 3, 2048, 16, 64), 64)
    x = torch.randn(case.shape, device=DEVICE, dtype=BF16)
    cos, sin = torch.randn(2, 2048, 32, device=DEVICE)
    out = rotary.apply_rotary_emb(x, cos, sin)
    assert torch.equal(out[-1], rotary.apply_rotary_emb(x[-1:], cos, sin)[0])
    rotary.apply_rotary_emb(x, cos, sin, inplace=True)
    assert torch.equal(x, out)
