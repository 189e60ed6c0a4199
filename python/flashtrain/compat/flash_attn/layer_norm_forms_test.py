"""The forms of the norms: parallel residual, layer_norm_fn, and the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.compat.flash_attn.norm_cases import hold_against_torch, leaves_of
from flashtrain.compat.flash_attn.ops import layer_norm
from flashtrain.compat.flash_attn.ops import rms_norm as compat_rms_norm
from flashtrain.compat.flash_attn.ops.triton import layer_norm as compat_triton
from flashtrain.ops.layer_norm.cases import BF16, FP16, FP32
from flashtrain.ops.reference import layer_norm as layer_norm_reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE, poisoned_memory

# The options decide what comes back, a tensor or a tuple, which types cannot say.
ln: Any = layer_norm
rms_norm: Any = compat_rms_norm
triton: Any = compat_triton
reference: Any = layer_norm_reference

COMPILE_BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


# --- Two branches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.37])
@pytest.mark.parametrize("tied", [False, True], ids=["two norms", "tied"])
@pytest.mark.parametrize("has_x1", [False, True], ids=["one branch", "two branches"])
@pytest.mark.parametrize(
    ("dtype", "residual", "in_fp32"),
    [(FP32, FP32, False), (BF16, BF16, False), (BF16, FP32, False), (FP16, None, True)],
)
def test_parallel_residual(dtype, residual, in_fp32, has_x1, tied, dropout_p, rms) -> None:
    shapes = {"x0": ((3, 5, 40), dtype), "weight0": ((40,), FP32)}
    if has_x1:
        shapes["x1"] = ((3, 5, 40), dtype)
    if residual is not None:
        shapes["residual"] = ((3, 5, 40), residual)
    if not tied:
        shapes["weight1"] = ((40,), FP32)
    if not rms:
        shapes |= {"bias0": ((40,), FP32)} | ({} if tied else {"bias1": ((40,), FP32)})
    function = (
        rms_norm.dropout_add_rms_norm_parallel_residual
        if rms
        else ln.dropout_add_layer_norm_parallel_residual
    )
    names = ("x0", "x1", "residual", "weight0", "bias0", "weight1", "bias1")

    def run(leaves):
        z0, z1, x, mask0, mask1 = function(
            *(leaves.get(name) for name in names), dropout_p, 1e-5, prenorm=True,
            residual_in_fp32=in_fp32, return_dropout_mask=True,
        )  # fmt: skip
        assert (z1 is None) == tied
        for mask in (mask0, mask1):
            assert mask.dtype == torch.uint8
            assert mask.shape == (3, 5, 40)
        assert bool((mask0 == 0).any()) == (dropout_p > 0.0)
        assert bool((mask1 == 0).any()) == (dropout_p > 0.0 and has_x1)
        if dropout_p > 0.0 and has_x1:
            assert not torch.equal(mask0, mask1)

        def expression(values, compute_dtype):
            results = reference.parallel_add_norm(
                *(values.get(name) for name in names), dropout_p, 1e-5, keep_mask0=mask0,
                keep_mask1=mask1, residual_in_fp32=in_fp32, is_rms_norm=rms,
                compute_dtype=compute_dtype,
            )  # fmt: skip
            return [t for t in results[:3] if t is not None]

        return [t for t in (z0, z1, x) if t is not None], expression

    k = tolerances.K_DROPOUT if dropout_p > 0.0 else tolerances.K_OUTPUT
    hold_against_torch(shapes, run, k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x1": (3, 4)}, r"x1: got shape \[3, 4\]; supported: \[2, 4\]"),
        ({"weight1": (5,)}, r"weight1: got shape \[5\]; supported: \[4\]"),
        ({"weight1": None}, "bias1: got one without weight1"),
        ({"bias1": (3,)}, r"bias1: got shape \[3\]"),
        ({"x0": None}, "x0: got NoneType; supported: Tensor"),
    ],
)
def test_parallel_residual_errors(changes: dict, message: str) -> None:
    shapes = {
        "x0": (2, 4), "x1": (2, 4), "residual": (2, 4), "weight0": (4,), "bias0": (4,),
        "weight1": (4,), "bias1": (4,),
    } | changes  # fmt: skip
    tensors = {
        n: None if shape is None else torch.ones(shape, device=DEVICE)
        for n, shape in shapes.items()
    }
    with pytest.raises((ValueError, TypeError), match=message):
        ln.dropout_add_layer_norm_parallel_residual(**tensors, dropout_p=0.0, epsilon=1e-5)


# --- layer_norm_fn --------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_layer_norm_fn(rms: bool, zero_centered: bool) -> None:
    shapes = {
        "x": ((4, 6, 32), BF16), "weight": ((32,), FP32), "bias": ((32,), FP32),
        "residual": ((4, 6, 32), FP32), "x1": ((4, 6, 32), BF16), "weight1": ((32,), FP32),
        "bias1": ((32,), FP32),
    }  # fmt: skip
    function = triton.rms_norm_fn if rms else triton.layer_norm_fn

    def run(leaves):
        y, y1, total, mask, mask1 = function(
            **leaves, eps=1e-5, dropout_p=0.2, prenorm=True, zero_centered_weight=zero_centered,
            return_dropout_mask=True,
        )  # fmt: skip
        assert mask.dtype == mask1.dtype == torch.bool
        assert total.dtype == FP32

        def expression(values, compute_dtype):
            results = reference.parallel_add_norm(
                values["x"], values["x1"], values["residual"], values["weight"], values["bias"],
                values["weight1"], values["bias1"], 0.2, 1e-5, keep_mask0=mask, keep_mask1=mask1,
                is_rms_norm=rms, zero_centered_weight=zero_centered, compute_dtype=compute_dtype,
            )  # fmt: skip
            return list(results[:3])

        return [y, y1, total], expression

    hold_against_torch(shapes, run, tolerances.K_DROPOUT)


def test_layer_norm_fn_returns_what_is_asked_for() -> None:
    x, residual = torch.randn(2, 5, 16, device=DEVICE)
    weight = torch.ones(16, device=DEVICE)
    expected = torch.nn.functional.layer_norm(x, (16,), eps=1e-6)
    torch.testing.assert_close(triton.layer_norm_fn(x, weight, None), expected)
    y, y1 = triton.layer_norm_fn(x, weight, None, weight1=weight * 2)
    torch.testing.assert_close(y1, expected * 2)
    torch.testing.assert_close(y, expected)
    y, total, mask, mask1 = triton.layer_norm_fn(
        x, weight, None, residual, prenorm=True, return_dropout_mask=True
    )
    torch.testing.assert_close(total, x + residual)
    assert mask is None
    assert mask1 is None
    rowscale = torch.rand(5, device=DEVICE)
    _, total = triton.rms_norm_fn(x, weight, None, residual, rowscale=rowscale, prenorm=True)
    torch.testing.assert_close(total, x * rowscale[:, None] + residual)
    with pytest.raises(ValueError, match="rowscale: got one with x1"):
        triton.layer_norm_fn(x, weight, None, x1=x, rowscale=rowscale)


@pytest.mark.parametrize("out_dtype", [FP32, FP16])
def test_out_dtype(out_dtype: torch.dtype) -> None:
    leaves = leaves_of({"x": ((5, 48), BF16), "weight": ((48,), FP32), "residual": ((5, 48), BF16)})
    for residual in (None, leaves["residual"]):
        y = triton.layer_norm_fn(leaves["x"], leaves["weight"], None, residual, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        total = leaves["x"] if residual is None else leaves["x"] + residual
        expected = torch.nn.functional.layer_norm(total.float(), (48,), leaves["weight"], eps=1e-6)
        torch.testing.assert_close(y, expected.to(out_dtype))
        ours = torch.autograd.grad(y, leaves["x"], torch.ones_like(y))[0]
        reference_grad = torch.autograd.grad(expected, leaves["x"], torch.ones_like(expected))[0]
        torch.testing.assert_close(ours, reference_grad, rtol=2e-2, atol=1e-3)


def test_out_and_residual_out_are_written_and_returned() -> None:
    leaves = leaves_of({"x": ((5, 48), BF16), "weight": ((48,), FP32), "residual": ((5, 48), FP32)})
    out, residual_out = (torch.empty(5, 48, device=DEVICE, dtype=t) for t in (FP32, FP32))
    y, total = triton.layer_norm_fn(
        **leaves, bias=None, prenorm=True, out=out, residual_out=residual_out
    )
    assert y is out
    assert total is residual_out
    torch.testing.assert_close(total, leaves["x"].float() + leaves["residual"])
    expected = torch.nn.functional.layer_norm(total, (48,), leaves["weight"], eps=1e-6)
    torch.testing.assert_close(y, expected)
    assert torch.autograd.grad(y.sum(), leaves["weight"])[0].isfinite().all()

    for name, bad, message in (
        ("out", torch.empty(5, 47, device=DEVICE), r"out: got torch.float32 \[5, 47\]; supported"),
        ("out", torch.empty(5, 48, device=DEVICE).int(), "out_dtype: got torch.int32"),
        ("residual_out", out.half(), "residual_out: got torch.float16 .*supported: torch.float32"),
        ("residual_out", [1], "residual_out: got list; supported: Tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            triton.layer_norm_fn(**leaves, bias=None, **{name: bad})


# --- Both under torch.compile, and as modules -----------------------------------------------------


def test_compile() -> None:
    x0, x1, residual = torch.randn(3, 6, 32, device=DEVICE)
    numbers = torch.tensor([0, 1, 2, 0, 3, 4], device=DEVICE)
    weight = torch.randn(32, device=DEVICE, requires_grad=True)

    def model(x0: Tensor, x1: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        z0, z1 = ln.dropout_add_layer_norm_parallel_residual(
            x0, x1, residual, weight, None, weight, None, 0.0, 1e-5
        )
        z = rms_norm.dropout_add_rms_norm_subset(
            x0[:4], residual, weight, None, 0.0, 1e-5, x0_subset=numbers, out_subset=numbers,
            out_numrows=4,
        )  # fmt: skip
        return z0, z1, z

    compiled = torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True)
    for a, b in zip(compiled(x0, x1, residual), model(x0, x1, residual)):
        torch.testing.assert_close(a, b)
    grads = []
    for function in (compiled, model):
        outputs = function(x0, x1, residual)
        grads.append(torch.autograd.grad(outputs, weight, [torch.ones_like(o) for o in outputs]))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("tied", [False, True])
def test_parallel_residual_modules(tied: bool) -> None:
    x0, x1, residual = torch.randn(3, 4, 5, 24, device=DEVICE)
    total = x0 + x1 + residual
    module = ln.DropoutAddLayerNormParallelResidual(
        24, tied_norm=tied, prenorm=True, p=0.5, device=DEVICE
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    z0, z1, x = module.eval()(x0, x1, residual)
    torch.testing.assert_close(x, total)
    expected = torch.nn.functional.layer_norm(total, (24,), module.weight0, module.bias0)
    torch.testing.assert_close(z0, expected)
    if tied:
        assert z1 is None
        assert set(module.state_dict()) == {"weight0", "bias0"}
    else:
        expected = torch.nn.functional.layer_norm(total, (24,), module.weight1, module.bias1)
        torch.testing.assert_close(z1, expected)
        assert set(module.state_dict()) == {"weight0", "bias0", "weight1", "bias1"}
    assert not torch.allclose(module.train()(x0, x1, residual)[2], total)

    rms = rms_norm.DropoutAddRMSNormParallelResidual(24, tied_norm=tied, device=DEVICE)
    z0, z1 = rms(x0, x1)
    torch.testing.assert_close(z0, torch.nn.functional.rms_norm(x0 + x1, (24,), eps=1e-5))
    assert (z1 is None) == tied
    assert set(rms.state_dict()) == {"weight0"} | (set() if tied else {"weight1"})


def test_modules() -> None:
    x0, residual = torch.randn(2, 3, 5, 48, device=DEVICE)
    module = ln.DropoutAddLayerNorm(48, prenorm=True, p=0.5, device=DEVICE)
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    z, x = module.eval()(x0, residual)
    torch.testing.assert_close(x, x0 + residual)
    torch.testing.assert_close(
        z, torch.nn.functional.layer_norm(x, (48,), module.weight, module.bias)
    )
    assert not torch.allclose(module.train()(x0, residual)[1], x)
    assert set(module.state_dict()) == {"weight", "bias"}

    rms = rms_norm.DropoutAddRMSNorm(48, device=DEVICE)
    torch.testing.assert_close(rms(x0, residual), torch.nn.functional.rms_norm(x, (48,), eps=1e-5))
    assert set(rms.state_dict()) == {"weight"}
    assert (
        rms_norm.DropoutAddRMSNorm(
            48, residual_in_fp32=True, prenorm=True, dtype=BF16, device=DEVICE
        )(x0.to(BF16))[1].dtype
        is FP32
    )


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_module(zero_centered: bool) -> None:
    module = triton.RMSNorm(40, zero_centered_weight=zero_centered, device=DEVICE)
    assert (module.weight == (0.0 if zero_centered else 1.0)).all()
    with torch.no_grad():
        module.weight.add_(torch.randn(40, device=DEVICE))
    x = torch.randn(6, 40, device=DEVICE, requires_grad=True)
    scale = module.weight + 1.0 if zero_centered else module.weight
    expected = torch.nn.functional.rms_norm(x, (40,), scale, 1e-5)
    z = module(x)
    torch.testing.assert_close(z, expected)
    grad = torch.randn_like(z)
    torch.testing.assert_close(
        torch.autograd.grad(z, (x, module.weight), grad),
        torch.autograd.grad(expected, (x, module.weight), grad),
    )
    torch.testing.assert_close(rms_norm.rms_norm(x, scale, 1e-5), z)
