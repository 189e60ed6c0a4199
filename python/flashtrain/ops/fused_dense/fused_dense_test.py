"""fused_dense against its reference: sizes, dtypes, activations, layouts, by the two-sided rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flashtrain.ops import fused_dense as fd
from flashtrain.ops.fused_dense.cases import (
    BF16,
    FP16,
    FP32,
    PATHS,
    Case,
    assert_as_exact_as_torch,
    check,
    forced,
    in_double,
    results_and_gradients,
)
from flashtrain.ops.reference import fused_dense as reference
from flashtrain.testing import tolerances
from flashtrain.testing.devices import DEVICE, needs_gpu_memory, poisoned_memory
from flashtrain.testing.shapes import ROWS


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "features", [(1, 1, 1), (7, 31, 2), (8, 16, 8), (64, 513, 65), (192, 768, 192), (800, 64, 8)]
)
@pytest.mark.parametrize("rows", ROWS)
def test_sizes(rows: int, features: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(Case((rows,), features, dtype))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("activation", fd.ACTIVATIONS)
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
def test_activations_and_checkpoint_levels(dtype, activation, checkpoint_lvl) -> None:
    for features in ((64, 128, 48), (30, 33, 20)):
        check(
            Case(
                (3, 7),
                features,
                dtype,
                activation,
                checkpoint_lvl=checkpoint_lvl,
                return_residual=checkpoint_lvl == 1,
            )
        )


@pytest.mark.parametrize(("bias1", "bias2"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_biases_and_residual(dtype, bias1: bool, bias2: bool) -> None:
    for return_residual in (False, True):
        check(Case((4, 5), dtype=dtype, bias1=bias1, bias2=bias2, return_residual=return_residual))


def test_many_rows() -> None:
    """Sums over rows are long enough to go through every stage of the bias gradients."""
    check(Case((5000,), (16, 40, 24), BF16))
    check(Case((5000,), (16, 40, 24), FP32))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about the CPU kernel's order of summation")
def test_the_bias_gradient_of_very_many_rows() -> None:
    """torch sums them in a tree, whose error does not grow with the rows as a chain's does."""
    torch.manual_seed(0)
    dout = torch.randn(1_000_000, 64, device=DEVICE)
    weight, bias = torch.ones(64, 1, device=DEVICE), torch.zeros(64, device=DEVICE)
    out = fd.fused_dense_func(dout[:, :1].contiguous(), weight, bias.requires_grad_())
    (dbias,) = torch.autograd.grad(out, bias, dout)
    tolerances.assert_as_exact_as_torch(
        "dbias", dbias, dout.sum(0), dout.sum(0, dtype=torch.float64), tolerances.K_WEIGHT_GRAD
    )


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("return_residual", [False, True])
def test_dense(dtype, with_bias: bool, return_residual: bool) -> None:
    def dense(inputs: dict[str, Tensor], compute_dtype: torch.dtype | None = None):
        out = reference.fused_dense(**({"bias": None} | inputs), compute_dtype=compute_dtype)
        return (out, inputs["x"]) if return_residual else (out,)

    shapes = (((0,), 8, 8), ((), 24, 16), ((2, 9), 64, 128), ((5,), 3, 7))
    for (leading, size_in, size_out), path in itertools.product(shapes, PATHS):
        case = Case(leading, (size_in, size_out, 1), dtype)

        def draw(seed: int, case=case, path=path) -> tolerances.Draw:
            all_inputs = case.inputs(seed)
            inputs = {"x": all_inputs["x"], "weight": all_inputs["weight1"]}
            if with_bias:
                inputs["bias"] = all_inputs["bias1"]
            with forced(path):
                out = fd.fused_dense_func(**inputs, return_residual=return_residual)
                outputs = out if return_residual else (out,)
                ours = results_and_gradients(inputs, outputs, seed + 1)
            in_torch = results_and_gradients(inputs, dense(inputs), seed + 1)
            doubles = in_double(inputs)
            exact = results_and_gradients(doubles, dense(doubles, torch.float64), seed + 1)
            return ours, in_torch, exact

        assert_as_exact_as_torch(*tolerances.pooled(draw))


def test_reference_passes_gradcheck() -> None:
    for activation in fd.ACTIVATIONS:
        case = Case((3,), (4, 5, 2), torch.float64, activation)
        inputs = case.inputs()

        def function(*values: Tensor, case=case, inputs=inputs):
            return case.reference(dict(zip(inputs, values)))

        assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_directional_derivatives() -> None:
    """gradcheck needs float64, which the kernels lack: differences in float32, one direction."""
    case = Case((6,), (16, 24, 8), FP32)
    inputs = case.inputs()

    def loss(values: dict[str, Tensor]) -> Tensor:
        (out,) = case.ours(values)
        return (out * out).sum()

    grads = torch.autograd.grad(loss(inputs), list(inputs.values()))
    for (name, value), grad in zip(inputs.items(), grads):
        direction, step = torch.randn_like(grad), 1e-2
        ahead = loss(inputs | {name: value + step * direction})
        behind = loss(inputs | {name: value - step * direction})
        numeric = ((ahead.double() - behind.double()) / (2 * step)).item()
        assert (grad * direction).sum().item() == pytest.approx(numeric, rel=1e-2, abs=0.1), name


@pytest.mark.parametrize("activation", fd.ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_rows(value: float, path: str, activation: str) -> None:
    case = Case((4,), (16, 32, 8), FP32, activation)
    inputs = case.inputs()
    with torch.no_grad():
        inputs["x"][2, 3] = value
    with forced(path):
        (out,) = case.ours(inputs)
        ours = results_and_gradients(inputs, (out,))
    (expected,) = case.reference(inputs)
    others = [0, 1, 3]
    assert not expected[2].isfinite().any()
    assert not out[2].isfinite().any()
    torch.testing.assert_close(out[others], expected[others])
    assert ours["dx"][others].isfinite().all()
    assert not ours["dweight1"][:, 3].isfinite().all()


def test_zero_rows_have_zero_gradients() -> None:
    for leading in ((0,), (2, 0)):
        case = Case(leading)
        inputs = case.inputs()
        (out,) = case.ours(inputs)
        assert out.shape == (*leading, 48)
        grads = results_and_gradients(inputs, (out,))
        assert grads["dx"].shape == inputs["x"].shape
        for name in ("weight1", "weight2", "bias1", "bias2"):
            assert (grads[f"d{name}"] == 0).all(), name


# --- Shapes and strides ---------------------------------------------------------------------------

_LAYOUTS = {
    "rows apart": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "odd start": lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
    "columns apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("path", PATHS)
def test_layouts(layout: str, path: str) -> None:
    case = Case((4, 6), dtype=FP32)
    inputs = case.inputs()
    arrange = _LAYOUTS[layout]
    with forced(path):
        plain = results_and_gradients(inputs, case.ours(inputs))
        moved = dict(inputs)
        for name in ("x", "weight1", "weight2"):
            moved[name] = arrange(inputs[name].detach()).requires_grad_()
            assert torch.equal(moved[name], inputs[name])
        (out,) = case.ours(moved)
        assert out.is_contiguous()
        results = results_and_gradients(moved, (arrange(out),))  # the gradient in the same layout
    for name, value in plain.items():
        torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_expanded_gradient() -> None:
    case = Case((5,), dtype=FP32)
    inputs = case.inputs()
    grads = torch.autograd.grad(case.ours(inputs)[0].sum(), list(inputs.values()))
    expected = torch.autograd.grad(case.reference(inputs)[0].sum(), list(inputs.values()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


def test_one_dimension() -> None:
    check(Case(()))


@needs_gpu_memory(60)
def test_more_than_two_to_the_31_elements() -> None:
    rows, case = 2**31 // 4096 + 8, Case((8,), (64, 4096, 64))
    inputs = case.inputs()
    torch.manual_seed(0)
    x = torch.randn(rows, 64, device=DEVICE).to(BF16)
    dout = torch.randn(8, 64, device=DEVICE).to(BF16)
    tail = {**inputs, "x": x[-8:].clone().requires_grad_()}
    (few,) = case.ours(tail)
    (few_dx,) = torch.autograd.grad(few, (tail["x"],), dout)
    whole = {**inputs, "x": x.requires_grad_()}
    (out,) = case.ours(whole)
    grad = torch.zeros_like(out)
    grad[-8:] = dout
    dx, dbias1 = torch.autograd.grad(out, (whole["x"], whole["bias1"]), grad)
    torch.testing.assert_close(out[-8:], few, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(dx[-8:], few_dx, rtol=2**-6, atol=2**-6)
    assert (dx[:-8] == 0).all()
    assert dbias1.isfinite().all()
