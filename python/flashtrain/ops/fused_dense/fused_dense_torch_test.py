"""fused_dense inside torch: gradients on demand, opcheck, compile, graphs, errors, modules."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtrain.ops import fused_dense as fd
from flashtrain.ops.fused_dense import autotune, kernels
from flashtrain.ops.fused_dense.cases import (
    BF16,
    FP16,
    FP32,
    INPUTS,
    PATHS,
    Case,
    forced,
    results_and_gradients,
)
from flashtrain.testing.devices import DEVICE, cuda_only, poisoned_memory, two_gpus_only

# Inductor needs a C++ compiler for CPU code, and half a minute; aot_eager runs the same traced
# graphs, fakes included, without code generation.
COMPILE_BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            # A few flips of roundings to bfloat16; a float32 sum moves by far less.
            tolerance = 1e-4 if value.dtype == FP32 else 2**-6
            torch.testing.assert_close(
                got[name], value, rtol=tolerance, atol=tolerance * 4, msg=name
            )


# --- Gradients: only what is asked for ------------------------------------------------------------

_FROZEN = [frozen for size in range(len(INPUTS)) for frozen in itertools.combinations(INPUTS, size)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ["gelu_approx", "relu"])
@pytest.mark.parametrize("checkpoint_lvl", [0, 1, 2])
def test_every_set_of_frozen_inputs(checkpoint_lvl: int, activation: str, path: str) -> None:
    case = Case((9,), dtype=FP32, activation=activation, checkpoint_lvl=checkpoint_lvl)
    inputs = case.inputs()
    for frozen in _FROZEN:
        part = {n: t.detach().requires_grad_(n not in frozen) for n, t in inputs.items()}
        with forced(path):
            ours = results_and_gradients(part, case.ours(part))
        _assert_close(ours, results_and_gradients(part, case.reference(part)))
        with forced(path):
            case.ours(part)[0].sum().backward()
        assert all(part[name].grad is None for name in frozen)


@pytest.mark.parametrize("path", PATHS)
def test_every_set_of_frozen_inputs_of_a_dense_layer(path: str) -> None:
    torch.manual_seed(0)
    shapes = {"x": (3, 5, 16), "weight": (24, 16), "bias": (24,)}
    inputs = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items()}
    for size in range(3):
        for frozen in itertools.combinations(inputs, size):
            part = {n: t.clone().requires_grad_(n not in frozen) for n, t in inputs.items()}
            with forced(path):
                ours = results_and_gradients(part, (fd.fused_dense_func(**part),))
            expected = nn.functional.linear(part["x"], part["weight"], part["bias"])
            _assert_close(ours, results_and_gradients(part, (expected,)))


def test_gradients_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fused_dense_weight_gradient", "fused_dense_input_gradient"):
        function = getattr(kernels, name)

        def spy(*args, name=name, function=function):
            calls.append((name, args[2] if "weight" in name else args[5]))
            return function(*args)

        monkeypatch.setattr(kernels, name, spy)
    case = Case((4,))
    inputs = {n: t.detach().requires_grad_(n == "bias2") for n, t in case.inputs().items()}
    case.ours(inputs)[0].sum().backward()
    assert calls == [("fused_dense_weight_gradient", [False, True])]
    calls.clear()
    inputs = {n: t.detach().requires_grad_(n == "bias1") for n, t in case.inputs().items()}
    case.ours(inputs)[0].sum().backward()
    assert calls == [("fused_dense_input_gradient", True)]


def _saved_elements(case: Case, **changes) -> int:
    """Elements kept for backward besides the inputs."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = case.inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        case.ours(inputs, **changes)
    own = {t.untyped_storage().data_ptr() for t in inputs.values()}
    return sum(t.numel() for address, t in saved.items() if address not in own)


def test_what_is_saved() -> None:
    hidden = 17 * 128
    saved = {"gelu_approx": (2, 1, 0), "sqrelu": (2, 1, 0), "relu": (1, 1, 0)}
    for activation, tensors in saved.items():
        for checkpoint_lvl, expected in enumerate(tensors):
            case = Case(activation=activation, checkpoint_lvl=checkpoint_lvl)
            assert _saved_elements(case) == expected * hidden
    assert _saved_elements(Case(), save_pre_act=False) == 0
    with torch.no_grad():
        assert _saved_elements(Case()) == 0


def test_backward_without_a_saved_pre_act() -> None:
    case = Case(dtype=FP32)
    inputs = case.inputs()
    expected = results_and_gradients(inputs, case.ours(inputs))
    _assert_close(results_and_gradients(inputs, case.ours(inputs, save_pre_act=False)), expected)


def test_only_one_output_is_used() -> None:
    case = Case((4,), dtype=FP32, return_residual=True)
    for used in (0, 1):
        inputs, expected = case.inputs(), case.inputs()
        case.ours(inputs)[used].square().sum().backward()
        case.reference(expected)[used].square().sum().backward()
        _assert_close(
            {n: t.grad for n, t in inputs.items()}, {n: t.grad for n, t in expected.items()}
        )


# --- torch's machinery ----------------------------------------------------------------------------


def test_twice_the_same_bits() -> None:
    case = Case((300,), (96, 384, 96))
    inputs = case.inputs()
    runs = [results_and_gradients(inputs, case.ours(inputs)) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


def _op_samples() -> dict[str, tuple]:
    x, dout = (torch.randn(3, 5, n, device=DEVICE, dtype=BF16) for n in (32, 48))
    weight, bias = torch.randn(48, 32, device=DEVICE, dtype=BF16), dout[0, 0]
    return {
        "fused_dense_forward": (x, weight, bias, 1, True, True),
        "fused_dense_forward (plain)": (x.transpose(0, 1), weight, None, 2, False, False),
        "fused_dense_input_gradient": (dout, weight, x, 1, None, True, True),
        "fused_dense_input_gradient (residual)": (dout, weight, None, 0, x, False, True),
        "fused_dense_weight_gradient": (dout, x, [True, True], True),
        "fused_dense_weight_gradient (bias)": (dout, x, [False, True], True),
        "fused_dense_activation": (x, 3),
    }


@pytest.mark.parametrize("name", _op_samples())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.flashtrain, name.split()[0]).default
    torch.library.opcheck(op, _op_samples()[name])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    case = Case((4, 6), return_residual=True, checkpoint_lvl=1)

    def model(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out, residual = case.ours(inputs)
        dense = fd.fused_dense_func(out, inputs["weight1"][:, :48], inputs["bias1"])
        return nn.functional.gelu(dense), residual * 2.0

    compiled = torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True, dynamic=dynamic)
    for leading in ((4, 6), (3, 8)):
        inputs = dataclasses.replace(case, leading=leading).inputs()
        expected = results_and_gradients(inputs, model(inputs))
        results = results_and_gradients(inputs, compiled(inputs))
        # The code that inductor generates for gelu may round bfloat16 otherwise than torch.
        torch.testing.assert_close(results, expected, rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    case = Case((4,), dtype=FP32, return_residual=True)
    inputs = case.inputs()
    with torch.autocast(DEVICE.type, dtype):
        out, residual = case.ours(inputs)
        expected, _ = case.reference(inputs)
        dense = fd.fused_dense_func(inputs["x"], inputs["weight1"])
    assert out.dtype == dense.dtype == dtype
    assert residual is inputs["x"]  # not rounded
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    grads = results_and_gradients(inputs, (out, residual))
    assert all(grads[f"d{name}"].dtype == FP32 for name in inputs)
    _assert_close(
        {n: g.to(dtype) for n, g in grads.items() if n != "residual"},
        {
            n: g.to(dtype)
            for n, g in results_and_gradients(inputs, (expected, inputs["x"])).items()
            if n != "residual"
        },
    )


def test_backward_inside_of_autocast() -> None:
    case = Case((4,), dtype=FP32)
    inputs = case.inputs()
    expected = results_and_gradients(inputs, case.ours(inputs))
    outputs = case.ours(inputs)
    with torch.autocast(DEVICE.type, BF16):
        _assert_close(results_and_gradients(inputs, outputs), expected)


def test_inference_mode_and_meta_tensors() -> None:
    inputs = Case().inputs()
    with torch.inference_mode():
        (out,) = Case().ours({n: t.detach() for n, t in inputs.items()})
    assert out.isfinite().all()
    (out,) = Case().ours({n: t.detach().to("meta") for n, t in inputs.items()})
    assert out.shape == (17, 48)
    assert out.dtype == BF16
    assert out.is_meta


@cuda_only
@pytest.mark.parametrize("known", [False, True])
def test_cuda_graph_capture(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is known yet, nothing is measured."""
    case = Case((64 if known else 72,), (128, 512, 128))
    inputs = case.inputs()

    def step() -> tuple[Tensor, ...]:
        (out,) = case.ours(inputs)
        return (out, *torch.autograd.grad(out, list(inputs.values()), out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), contextlib.nullcontext() if known else forced("fused"):
        step()  # warm-up, outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    monkeypatch.setattr(autotune, "_search", lambda product: pytest.fail("measured"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            for name, value in case.inputs(seed).items():
                inputs[name].copy_(value)
        graph.replay()
        (out,) = case.reference(inputs)
        grads = torch.autograd.grad(out, list(inputs.values()), out)
        torch.testing.assert_close(captured, (out, *grads), rtol=2e-2, atol=0.25)


@cuda_only
def test_runs_in_the_current_stream() -> None:
    x = torch.zeros(4096, 1024, device=DEVICE, dtype=BF16)
    weight = torch.randn(1024, 1024, device=DEVICE, dtype=BF16).requires_grad_()
    bias = torch.zeros(1024, device=DEVICE, dtype=BF16, requires_grad=True)
    fd.fused_dense_func(x, weight, bias).sum().backward()  # measures
    weight.grad = bias.grad = None
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long enough that a kernel in another stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        x.copy_(torch.randn(4096, 1024, device=DEVICE))
        out = fd.fused_dense_func(x, weight, bias)
        out.backward(torch.ones_like(out))
    stream.synchronize()
    torch.testing.assert_close(out, nn.functional.linear(x, weight, bias), rtol=2e-2, atol=0.5)
    assert weight.grad.abs().sum() > 0
    assert (bias.grad == 4096).all()


@two_gpus_only
def test_second_device() -> None:
    other = torch.device("cuda", 1)
    case = Case((64,))
    inputs = {n: t.detach().to(other).requires_grad_() for n, t in case.inputs().items()}
    assert torch.cuda.current_device() == 0
    (out,) = case.ours(inputs)
    torch.testing.assert_close(out, case.reference(inputs)[0], rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert all(t.grad.device == other for t in inputs.values())
    assert torch.cuda.current_device() == 0


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.float64}, "x: got dtype torch.float64; supported: torch.float32, torch.floa"),
        ({"x": ()}, r"x: got shape \[\]; supported: \[..., I\]"),
        ({"x": (2, 0), "weight1": (5, 0)}, r"x: got shape \[2, 0\]"),
        ({"weight1": (5, 3)}, r"weight1: got shape \[5, 3\]; supported: \[features, 4\], to fit x"),
        ({"weight1": (4,)}, r"weight1: got shape \[4\]"),
        ({"weight1": (0, 4), "bias1": (0,)}, r"weight1: got shape \[0, 4\]"),
        ({"weight2": (3, 4)}, r"weight2: got shape \[3, 4\]; supported: \[features, 5\]"),
        ({"weight2": torch.bfloat16}, "weight2: got dtype torch.bfloat16; supported: x's, torch.f"),
        ({"bias1": (4,)}, r"bias1: got shape \[4\]; supported: \[5\], to fit weight1 \[5, 4\]"),
        ({"bias2": torch.float16}, "bias2: got dtype torch.float16"),
        ({"activation": "gelu"}, "activation: got 'gelu'; supported: 'gelu_approx', 'relu', 'sqr"),
        ({"checkpoint_lvl": 3}, "checkpoint_lvl: got 3; supported: 0, 1, 2"),
        ({"heuristic": -2}, "heuristic: got -2; supported: -1"),
        ({"heuristic": "fast"}, "heuristic: got 'fast'"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    shapes = {"x": (2, 4), "weight1": (5, 4), "weight2": (3, 5), "bias1": (5,), "bias2": (3,)}
    arguments: dict = {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    for name, change in changes.items():
        if isinstance(change, torch.dtype):
            change = arguments[name].to(change)
        elif isinstance(change, tuple):
            change = torch.zeros(change, device=DEVICE)
        arguments[name] = change
    with pytest.raises(ValueError, match=message):
        fd.fused_mlp_func(**arguments)


def test_devices_must_agree() -> None:
    other = torch.zeros(4, 4, device="cpu" if DEVICE.type == "cuda" else "meta")
    with pytest.raises(ValueError, match=r"weight: is on .*; supported: x's device"):
        fd.fused_dense_func(torch.zeros(2, 4, device=DEVICE), other)


# --- Modules --------------------------------------------------------------------------------------


def test_modules() -> None:
    x = torch.randn(2, 3, 16, device=DEVICE)
    dense = fd.FusedDense(16, 24, device=DEVICE)
    linear = nn.Linear(16, 24, device=DEVICE)
    linear.load_state_dict(dense.state_dict())
    torch.testing.assert_close(dense(x), linear(x))
    out, residual = fd.FusedDense(16, 8, bias=False, return_residual=True, device=DEVICE)(x)
    assert out.shape == (2, 3, 8)
    assert torch.equal(residual, x)

    mlp = fd.FusedMLP(16, activation="sqrelu", bias2=False, device=DEVICE)
    assert sorted(mlp.state_dict()) == ["fc1.bias", "fc1.weight", "fc2.weight"]
    assert mlp.fc1.weight.shape == (64, 16)
    expected = mlp.fc2(nn.functional.relu(mlp.fc1(x)).square())
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp.eval()(x), expected)
    plain = fd.FusedMLP(16, 32, 8, heuristic=-1, checkpoint_lvl=2, device=DEVICE)
    assert plain(x).shape == (2, 3, 8)


def test_outputs_may_be_written_to() -> None:
    """In place, and through views, as rotary embeddings are applied to a projection."""
    inputs = Case((2, 3), dtype=FP32).inputs()
    (out,) = Case((2, 3), dtype=FP32).ours(inputs)
    expected = torch.autograd.grad((2 * out).square().sum(), inputs["x"], retain_graph=True)
    out.view(6, -1).mul_(2)
    assert torch.equal(torch.autograd.grad(out.square().sum(), inputs["x"])[0], expected[0])
