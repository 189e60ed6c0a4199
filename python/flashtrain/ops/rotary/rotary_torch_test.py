"""rotary inside torch: autograd, opcheck, compile, graphs, errors; and the module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops import rotary
from flashtrain.ops.reference import rotary as reference
from flashtrain.ops.rotary.cases import BF16, FP16, FP32, Case, positions_of
from flashtrain.testing.devices import DEVICE, cuda_only, poisoned_memory, two_gpus_only

# Inductor needs a C++ compiler for CPU code, and half a minute.
COMPILE_BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


# --- Autograd -------------------------------------------------------------------------------------


def test_in_place_on_views_of_one_tensor() -> None:
    """q and k rotated as views of qkv: autograd follows all that qkv is used for."""
    case = Case((2, 7, 3, 4, 16), 16, FP32)
    leaf, tables = case.x(), case.tables()
    qkv = leaf * 1
    q = rotary.apply_rotary_emb(qkv[:, :, 0], *tables, inplace=True)
    k = rotary.apply_rotary_emb(qkv[:, :, 1], *tables, inplace=True)
    loss = (q * k).sum() + (qkv * qkv).sum()
    positions = positions_of(case.shape)
    parts = [
        reference.apply_rotary_emb(leaf[:, :, 0], *tables, position_ids=positions),
        reference.apply_rotary_emb(leaf[:, :, 1], *tables, position_ids=positions),
        leaf[:, :, 2],
    ]
    expected = (parts[0] * parts[1]).sum() + sum((part * part).sum() for part in parts)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf))


def test_a_shared_gradient_is_not_written_to() -> None:
    """A sum hands the same gradient to both its terms."""
    case = Case(dtype=FP32)
    leaf, tables = case.x(), case.tables()
    other = leaf.detach().clone().requires_grad_()
    out = rotary.apply_rotary_emb(leaf * 1, *tables, inplace=True)
    grad = torch.randn_like(out)
    kept = grad.clone()
    _, d_other = torch.autograd.grad(out + other, (leaf, other), grad)
    assert torch.equal(grad, kept)
    assert torch.equal(d_other, kept)


def test_in_place_on_a_leaf_is_refused() -> None:
    case = Case()
    with pytest.raises(RuntimeError, match="x: is a leaf Variable that requires grad"):
        rotary.apply_rotary_emb(case.x(), *case.tables(), inplace=True)


def test_saved_tensors_that_are_rotated_are_noticed() -> None:
    case = Case(dtype=FP32)
    x = case.x() * 1
    square = (x * x).sum()
    rotary.apply_rotary_emb(x, *case.tables(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_double_backward_is_refused() -> None:
    case = Case(dtype=FP32)
    x = case.x()
    out = rotary.apply_rotary_emb(x, *case.tables())
    (grad,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        grad.sum().backward()


# --- torch's machinery ----------------------------------------------------------------------------


def _op_samples() -> dict[str, tuple]:
    case = Case((2, 5, 4, 16), 8)
    x, (cos, sin) = case.x().detach(), case.tables()
    offsets = torch.tensor([3, 1], device=DEVICE)
    ids = torch.arange(10, device=DEVICE).view(2, 5)
    cu = torch.tensor([0, 2, 10], device=DEVICE, dtype=torch.int32)
    none = (None,) * 5
    return {
        "rotary": (x, cos, sin, *none, 4, 0, 3, False, False),
        "rotary (offsets)": (x, cos, sin, None, None, offsets, None, None, 4, 0, 0, True, True),
        "rotary (ids)": (x, cos, sin, sin, cos, None, None, ids, 1, 2, 0, False, False),
        "rotary (sequences)": (
            x.flatten(0, 1), cos, sin, None, None, offsets.int(), cu, None, 2, 1, 0, False, False,
        ),
        "rotary_": (x, cos, sin, *none, 4, 0, 3, False, False),
        "rotary_ (packed)": (
            torch.randn(2, 5, 3, 2, 16, device=DEVICE), cos, sin, *none, 2, 2, 0, False, True,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _op_samples())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.flashtrain, name.split()[0]).default
    torch.library.opcheck(op, _op_samples()[name])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("where", ["input", "intermediate"])
@pytest.mark.parametrize("how", ["new", "in place", "view in place", "qkv", "kv", "module"])
def test_compile(how: str, where: str, dynamic: bool) -> None:
    """On a tensor that enters the graph, and on one that the graph computes."""
    torch._dynamo.reset()  # all cases are one function to its limit of recompilations
    module = rotary.RotaryEmbedding(16, scale_base=512.0)
    cos, sin = Case((1,), 16, FP32).tables()

    def model(x: Tensor) -> Tensor:
        if where == "intermediate":
            x = torch.nn.functional.gelu(x)
        if how == "module":
            return module(x) * 2.0
        if how == "qkv":
            return rotary.apply_rotary_emb_qkv_(x, cos, sin) * 2.0
        if how == "kv":
            return rotary.apply_rotary_emb_kv_(x, cos, sin) * 2.0
        part = x[:, :, 0] if how == "view in place" else x
        out = rotary.apply_rotary_emb(part, cos, sin, inplace=how != "new")
        return out * part + x.sum()

    compiled = torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True, dynamic=dynamic)
    heads = {"qkv": (3, 2), "module": (3, 2), "kv": (2, 2), "view in place": (3, 2)}.get(how, (2,))
    for batch in ((2, 7), (3, 9)):
        leaf = Case((*batch, *heads, 16), dtype=FP32).x()
        inputs = [leaf * 1.0 for _ in range(2)]
        out, expected = compiled(inputs[0]), model(inputs[1])
        # The code that inductor generates for gelu may round otherwise than torch.
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*inputs, rtol=1e-4, atol=1e-4)
        # Of what is returned, and of the tensor that was written to.
        grads = (torch.randn_like(out), torch.randn_like(leaf))
        (ours,), (theirs,) = (
            torch.autograd.grad(results, leaf, grads)
            for results in ((out, inputs[0]), (expected, inputs[1]))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiled_modules_keep_no_tables() -> None:
    """What a compiled graph gives out, the next run of a CUDA graph may overwrite."""
    torch._dynamo.reset()
    module = rotary.RotaryEmbedding(16)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    qkv = Case((2, 7, 3, 2, 16), dtype=FP32).x().detach()
    out = compiled(qkv.clone())
    assert module._tables is None
    assert torch.equal(out, module(qkv.clone()))
    tables = module._tables
    assert torch.equal(compiled(qkv.clone()), out)
    assert module._tables is tables


@pytest.mark.parametrize("where", ["in", "out"])
def test_compiled_calls_refuse_shared_memory(where: str) -> None:
    cos, sin = Case((1,), 16, FP32).tables()
    x = torch.randn(1, 7, 1, 16, device=DEVICE).expand(1, 7, 3, 16)

    def rotate(x: Tensor) -> Tensor:
        return rotary.apply_rotary_emb(x, cos, sin, inplace=True)

    call = torch.compile(rotate, backend="aot_eager") if where == "in" else rotate
    with pytest.raises((ValueError, RuntimeError), match="elements share memory"):
        call(x)


def test_inference_mode_and_meta_tensors() -> None:
    case = Case()
    x, tables = case.x().detach(), case.tables()
    with torch.inference_mode():
        out = rotary.apply_rotary_emb(x.clone(), *tables, inplace=True)
    assert torch.equal(out, rotary.apply_rotary_emb(x, *tables))
    out = rotary.apply_rotary_emb(x.to("meta"), *(t.to("meta") for t in tables))
    assert out.is_meta
    assert out.shape == x.shape


def test_twice_the_same_bits() -> None:
    case = Case((3, 50, 12, 64), 64)
    runs = [rotary.apply_rotary_emb(case.x(), *case.tables()) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU threads")
def test_same_bits_for_any_number_of_threads() -> None:
    case = Case((4, 50, 12, 64), 64)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(rotary.apply_rotary_emb(case.x(), *case.tables()))
            assert _kernels.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@cuda_only
def test_cuda_graph() -> None:
    case = Case()
    x, tables = case.x().detach(), case.tables()
    offsets = torch.zeros(2, device=DEVICE, dtype=torch.int64)
    rotary.apply_rotary_emb(x, *tables, seqlen_offsets=offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rotary.apply_rotary_emb(x, *tables, seqlen_offsets=offsets)
    for first in (0, 5):
        offsets.copy_(torch.tensor([first, 2 * first]))
        graph.replay()
        assert torch.equal(out, rotary.apply_rotary_emb(x, *tables, seqlen_offsets=offsets))
        assert torch.equal(out[0], rotary.apply_rotary_emb(x[:1], *tables, seqlen_offsets=first)[0])


@cuda_only
def test_runs_in_the_current_stream_without_waiting() -> None:
    cos, sin = torch.randn(2, 4096, 32, device=DEVICE)
    x = torch.zeros(4, 4096, 8, 64, device=DEVICE)
    fresh = torch.randn_like(x)
    offsets = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)
            x.copy_(fresh)
            out = rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(out, rotary.apply_rotary_emb(fresh, cos, sin))


@two_gpus_only
def test_second_device() -> None:
    case = Case()
    x, tables = case.x().detach(), case.tables()
    other = torch.device("cuda", 1)
    out = rotary.apply_rotary_emb(x.to(other), *(t.to(other) for t in tables))
    assert out.device == other
    assert torch.equal(out.to(x.device), rotary.apply_rotary_emb(x, *tables))


# --- Errors ---------------------------------------------------------------------------------------


def _zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, device=DEVICE, dtype=dtype)


_IDS = torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": _zeros(2, 5, 3, 8, dtype=torch.float64)}, "x: got dtype torch.float64; supported"),
        ({"x": _zeros(5, 3, 8)}, r"x: got shape \[5, 3, 8\]; supported: \[B, S, H, D\]"),
        ({"cos": _zeros(9, 5)}, r"cos: got shape \[9, 5\]; supported: \[positions, R / 2\]"),
        ({"cos": _zeros(9)}, r"cos: got shape \[9\]"),
        ({"cos": _zeros(9, 0), "sin": _zeros(9, 0)}, r"cos: got shape \[9, 0\]"),
        ({"sin": _zeros(8, 4)}, r"sin: got shape \[8, 4\]; .* of all tables the same"),
        ({"cos": _zeros(9, 4, dtype=FP16)}, "cos: got dtype torch.float16; .*: torch.float32$"),
        ({"sin": _zeros(9, 4).requires_grad_()}, r"sin: requires grad, .*sin.detach\(\)"),
        ({"seqlen_offsets": 5}, "seqlen_offsets: got 5, so positions 5 to 9; .* 0 to 8"),
        ({"seqlen_offsets": _zeros(2)}, "seqlen_offsets: got dtype torch.float32; supported"),
        ({"seqlen_offsets": _zeros(3, dtype=_IDS)}, r"seqlen_offsets: got shape \[3\]; .*\[2\]"),
        ({"position_ids": _zeros(3, 5, dtype=_IDS)}, r"position_ids: got shape \[3, 5\]; .*2, 5"),
        (
            {"position_ids": _zeros(2, 5, dtype=_IDS), "seqlen_offsets": 1},
            "position_ids: given with seqlen_offsets or cu_seqlens; supported: by itself",
        ),
        ({"cu_seqlens": _zeros(3, dtype=_IDS)}, r"x: got .*supported: \[T, H, D\] with cu_seqlens"),
        (
            {"x": _zeros(5, 3, 8), "cu_seqlens": _zeros(3)},
            "cu_seqlens: got dtype torch.float32; supported: torch.int32, torch.int64",
        ),
        (
            {"x": _zeros(5, 3, 8), "cu_seqlens": _zeros(2, 1, dtype=_IDS)},
            r"cu_seqlens: got shape \[2, 1\]; supported: \[2\]",
        ),
        (
            {"x": _zeros(5, 3, 8), "cu_seqlens": _zeros(3, dtype=_IDS), "seqlen_offsets": 9},
            "seqlen_offsets: got 9, so positions 9 to 9; .* 0 to 8",
        ),
        ({"inplace": True, "x": _zeros(2, 5, 1, 8).expand(2, 5, 3, 8)}, "x: got strides .*share"),
        ({"inplace": True, "x": _zeros(34).as_strided((1, 2, 3, 8), (9, 9, 8, 1))}, "x: got str"),
        ({"inplace": True, "x": torch._neg_view(_zeros(2, 5, 3, 8))}, "x: is a view with a negat"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    arguments = {"x": _zeros(2, 5, 3, 8), "cos": _zeros(9, 4), "sin": _zeros(9, 4)}
    with pytest.raises(ValueError, match=message):
        rotary.apply_rotary_emb(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cos": None}, "cos: got NoneType; supported: Tensor"),
        ({"seqlen_offsets": 1.5}, "seqlen_offsets: got float; supported: int or Tensor"),
        ({"position_ids": [0]}, "position_ids: got list; supported: Tensor or None"),
    ],
)
def test_wrong_types(changes: dict, message: str) -> None:
    arguments = {"x": _zeros(2, 5, 3, 8), "cos": _zeros(9, 4), "sin": _zeros(9, 4)}
    with pytest.raises(TypeError, match=message):
        rotary.apply_rotary_emb(**(arguments | changes))


def test_devices_must_agree() -> None:
    other = torch.zeros(9, 4, device="cpu" if DEVICE.type == "cuda" else "meta")
    with pytest.raises(ValueError, match=r"cos: is on .*; supported: .*, as x"):
        rotary.apply_rotary_emb(_zeros(2, 5, 3, 8), other, other)


def test_errors_of_packed_tensors() -> None:
    tables = (_zeros(9, 4), _zeros(9, 4))
    with pytest.raises(ValueError, match=r"qkv: got shape \[2, 5, 2, 3, 8\]; supported: \[B, S, 3"):
        rotary.apply_rotary_emb_qkv_(_zeros(2, 5, 2, 3, 8), *tables)
    for num_heads_q in (None, 3, 7):
        with pytest.raises(ValueError, match=f"num_heads_q: got {num_heads_q}, for qkv"):
            rotary.apply_rotary_emb_qkv_(_zeros(2, 5, 6, 8), *tables, num_heads_q=num_heads_q)
    with pytest.raises(ValueError, match="cos_k, sin_k: got one of them"):
        rotary.apply_rotary_emb_qkv_(_zeros(2, 5, 3, 3, 8), *tables, tables[0])
    with pytest.raises(ValueError, match=r"kv: got shape \[2, 5, 3, 3, 8\]; supported: \[B, S, 2"):
        rotary.apply_rotary_emb_kv_(_zeros(2, 5, 3, 3, 8), *tables)
    with pytest.raises(ValueError, match=r"kv: got shape \[2, 5, 2, 8\]; .* \[B, S, 2, H, D\]"):
        rotary.apply_rotary_emb_kv_(_zeros(2, 5, 2, 8), *tables)


def test_max_seqlen_is_asked_for_where_the_host_does_not_know_it() -> None:
    module = rotary.RotaryEmbedding(8)
    qkv = _zeros(2, 5, 3, 2, 8)
    with pytest.raises(ValueError, match="max_seqlen: got None; it is needed with cu_seqlens"):
        module(qkv, seqlen_offset=_zeros(2, dtype=_IDS))
    module(qkv, seqlen_offset=_zeros(2, dtype=_IDS), max_seqlen=9)


@pytest.mark.parametrize("how", ["offset", "offsets", "ids", "sequences"])
def test_max_seqlen_is_an_upper_bound(how: str) -> None:
    """Dao-AILab/flash-attention's callers pass the most that an integer holds."""
    far = 2**31 - 1
    module = rotary.RotaryEmbedding(8)
    module.extend_tables(50, DEVICE)
    qkv = Case((2, 5, 3, 2, 8), dtype=FP32).x().detach()
    expected = module(qkv.clone(), seqlen_offset=2)
    options: dict = {"seqlen_offset": 2}
    if how == "offsets":
        options = {"seqlen_offset": torch.tensor([2, 2], device=DEVICE)}
    elif how == "ids":
        options = {"position_ids": torch.arange(2, 7, device=DEVICE)}
    elif how == "sequences":
        cu_seqlens = torch.tensor([0, 5, 10], device=DEVICE)
        options["cu_seqlens"] = cu_seqlens
        qkv = qkv.flatten(0, 1)
        assert module._tables is not None
        cos, sin = module._tables[:2]
        out = rotary.apply_rotary_emb(
            qkv[:, 0], cos, sin, seqlen_offsets=2, cu_seqlens=cu_seqlens, max_seqlen=far
        )
        assert torch.equal(out.view(2, 5, 2, 8), expected[:, :, 0])
    if DEVICE.type == "cuda" and how in ("offsets", "ids"):
        far = 60  # the host does not know the positions there, and makes tables of this length
    assert torch.equal(module(qkv, max_seqlen=far, **options).view_as(expected), expected)
    assert module._seq_len_cached <= 100


@pytest.mark.parametrize("dim", [0, 3, -2])
def test_odd_dims_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim: got {dim}; supported: even, at least 2"):
        rotary.RotaryEmbedding(dim)


def test_dtype_of_tables_and_x_may_differ() -> None:
    case = Case(dtype=BF16, table=FP32)
    x, (cos, sin) = case.x().detach(), case.tables()
    in_fp32 = rotary.apply_rotary_emb(x.float(), cos, sin)
    assert torch.equal(rotary.apply_rotary_emb(x, cos, sin), in_fp32.to(BF16))
