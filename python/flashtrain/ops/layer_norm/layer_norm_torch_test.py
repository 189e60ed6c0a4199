"""layer_norm inside torch: gradients on demand, opcheck, compile, graphs, errors, modules."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops import layer_norm as ln
from flashtrain.ops.layer_norm import kernels
from flashtrain.ops.layer_norm.cases import (
    BF16,
    FP16,
    FP32,
    Case,
    assert_same_numbers,
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


# --- Gradients: only what is asked for ------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(
    "frozen",
    [("weight",), ("bias",), ("weight", "bias"), ("x0",), ("residual",), ("x0", "residual"),
     ("layerscale",), ("x0", "residual", "layerscale")],
    ids=" ".join,
)  # fmt: skip
def test_frozen_inputs(frozen: tuple[str, ...], dropout_p: float) -> None:
    case = Case((9, 48), BF16, BF16, dropout_p=dropout_p, layerscale=True)
    inputs = case.inputs()
    torch.manual_seed(1)
    full = results_and_gradients(inputs, case.ours(inputs))
    part = {n: t.detach().requires_grad_(n not in frozen) for n, t in inputs.items()}
    torch.manual_seed(1)
    outputs = case.ours(part)
    torch.manual_seed(1)
    torch.autograd.backward(
        outputs, [torch.randn(o.shape, device=DEVICE).to(BF16).to(o.dtype) for o in outputs]
    )
    assert all(part[name].grad is None for name in frozen)
    got = {f"d{name}": t.grad for name, t in part.items() if name not in frozen}
    assert_same_numbers(got, {name: full[name] for name in got})


def test_gradients_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backward = kernels.backward

    def spy(*args):
        asked.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(kernels, "backward", spy)
    case = Case((4, 32), BF16, BF16)
    inputs = case.inputs()
    inputs = {n: t.detach().requires_grad_(n == "residual") for n, t in inputs.items()}
    case.ours(inputs)[0].sum().backward()
    # x = x0 + residual: one gradient, written once, where the gradient of x0 goes.
    assert asked == [[True, False, False, False, False]]


def test_only_one_output_is_used() -> None:
    case = Case((4, 32), FP32, FP32)
    for used in (0, 1):
        inputs = case.inputs()
        case.ours(inputs)[used].sum().backward()
        expected = {n: t.detach().requires_grad_() for n, t in inputs.items()}
        case.reference(expected, None, None)[used].sum().backward()
        for name, tensor in inputs.items():
            grad = expected[name].grad
            grad = torch.zeros_like(tensor) if grad is None else grad
            torch.testing.assert_close(tensor.grad, grad, msg=name)


def test_double_backward_is_refused() -> None:
    case = Case((4, 32), FP32, FP32)
    inputs = case.inputs()
    z, _ = case.ours(inputs)
    (grad,) = torch.autograd.grad((z * z).sum(), inputs["x0"], create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        grad.sum().backward()


# --- torch's machinery ----------------------------------------------------------------------------


def test_twice_the_same_bits() -> None:
    case = Case((300, 1000), BF16, FP32, dropout_p=0.1, layerscale=True)
    inputs = case.inputs()
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(results_and_gradients(inputs, case.ours(inputs)))
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU threads")
def test_runs_on_the_threads_of_torch() -> None:
    """A second pool would fight with torch's for the cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.ones(2**20).sum()  # now torch's threads are there
        threads = set(os.listdir("/proc/self/task"))
        ln.layer_norm(torch.randn(4096, 256), torch.ones(256), torch.zeros(256), 1e-5)
        # None is new. Some may be gone: of more than 3, OpenMP ends the rest by and by.
        assert set(os.listdir("/proc/self/task")) <= threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU threads")
def test_same_bits_for_any_number_of_threads() -> None:
    case = Case((700, 300), FP32, FP32)
    inputs = case.inputs()
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results_and_gradients(inputs, case.ours(inputs)))
            assert _kernels.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(other[name], value), name


def _op_samples() -> dict[str, tuple]:
    x0 = torch.randn(3, 5, 32, device=DEVICE, dtype=BF16)
    weight, bias = torch.randn(2, 32, device=DEVICE)
    state = torch.tensor([1, 2], device=DEVICE)
    rows = torch.randn(3, 5, device=DEVICE)
    args = (x0, x0.float(), weight, bias, rows, weight, state, 0.5, 1e-5, False, False, BF16, FP32)
    full = (x0, x0.float(), x0.float(), x0, rows, rows.abs(), weight, rows, weight, state, 0.5)
    return {
        "layer_norm_forward": (x0, weight, bias, 1e-5, False, False, BF16),
        "layer_norm_forward (rms)": (x0.transpose(0, 1), weight, None, 1e-5, True, True, FP32),
        "dropout_add_layer_norm_forward": args,
        "dropout_add_layer_norm_mask_forward": args,
        "layer_norm_backward": (*full, False, False, BF16, [True] * 5),
        "layer_norm_backward (rms)": (
            x0, None, x0, None, None, rows.abs(), weight, None, None, None, 0.0, True, False, BF16,
            [False, True, True, False, False],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _op_samples())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.flashtrain, name.split()[0]).default
    torch.library.opcheck(op, _op_samples()[name])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    case = Case((4, 6, 64), BF16, FP32, layerscale=True, rowscale=True)

    def model(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        z, x = case.ours(inputs)
        return torch.nn.functional.gelu(z), x * 2.0

    compiled = torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True, dynamic=dynamic)
    for shape in ((4, 6, 64), (3, 8, 64)):
        inputs = dataclasses.replace(case, shape=shape).inputs()
        expected = results_and_gradients(inputs, model(inputs))
        results = results_and_gradients(inputs, compiled(inputs))
        # The code that inductor generates for gelu may round bfloat16 otherwise than torch.
        torch.testing.assert_close(results, expected, rtol=2e-2, atol=2e-2)


def test_compile_with_dropout() -> None:
    case = Case((64, 256), FP32, FP32, dropout_p=0.5)
    inputs = case.inputs()
    compiled = torch.compile(
        lambda inputs: case.ours(inputs, return_dropout_mask=True),
        backend=COMPILE_BACKEND,
        fullgraph=True,
    )
    torch.manual_seed(3)
    z, x, mask = compiled(inputs)
    again = compiled(inputs)[2]
    assert not torch.equal(mask, again)
    assert 0.4 < mask.float().mean() < 0.6
    torch.manual_seed(3)
    assert torch.equal(compiled(inputs)[2], mask)
    # The backward pass drops what the forward pass did.
    ours = results_and_gradients(inputs, (z, x))
    expected = results_and_gradients(inputs, case.reference(inputs, None, mask))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    for x0_dtype in (FP32, dtype):
        case = Case((4, 64), x0_dtype, FP32)
        inputs = case.inputs()
        plain = case.ours(inputs)
        with torch.autocast(DEVICE.type, dtype):
            outputs = case.ours(inputs)
        for a, b in zip(outputs, plain):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_inference_mode_and_meta_tensors() -> None:
    case = Case((4, 64), dropout_p=0.1)
    inputs = case.inputs()
    with torch.inference_mode():
        z, x = case.ours({n: t.detach() for n, t in inputs.items()})
    assert z.isfinite().all()
    assert x.isfinite().all()
    z, x = case.ours({n: t.detach().to("meta") for n, t in inputs.items()})
    assert z.shape == (4, 64)
    assert z.dtype == BF16
    assert z.is_meta
    assert x.is_meta


@cuda_only
def test_cuda_graph_capture_draws_a_new_mask_at_each_replay() -> None:
    case = Case((64, 256), BF16, FP32, dropout_p=0.3)
    inputs = case.inputs()

    def step() -> tuple[Tensor, ...]:
        *outputs, mask = case.ours(inputs, return_dropout_mask=True)
        grads = torch.autograd.grad(outputs, (inputs["x0"], inputs["weight"]), outputs)
        return (*outputs, mask, *grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up, outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    masks = []
    for _ in range(2):
        graph.replay()
        z, x, mask, dx0, dweight = (t.clone() for t in captured)
        expected = case.reference(inputs, None, mask)
        torch.testing.assert_close((z, x), expected, rtol=2e-2, atol=2e-2)
        grads = torch.autograd.grad(expected, (inputs["x0"], inputs["weight"]), (z, x))
        torch.testing.assert_close((dx0, dweight), grads, rtol=2e-2, atol=5e-2)
        masks.append(mask)
    assert not torch.equal(*masks)


@cuda_only
def test_runs_in_the_current_stream() -> None:
    rows, cols = 4096, 4096
    x0 = torch.zeros(rows, cols, device=DEVICE)
    weight = torch.ones(cols, device=DEVICE, requires_grad=True)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long enough that a kernel in another stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        x0.copy_(torch.randn(rows, cols, device=DEVICE))
        z = ln.rms_norm(x0, weight, 1e-5)
        z.backward(torch.ones_like(z))
    stream.synchronize()
    torch.testing.assert_close(z, torch.nn.functional.rms_norm(x0, (cols,), eps=1e-5))
    assert weight.grad.abs().sum() > 0


@two_gpus_only
def test_second_device() -> None:
    other = torch.device("cuda", 1)
    case = Case((16, 128), BF16, FP32, dropout_p=0.1)
    inputs = {n: t.detach().to(other).requires_grad_() for n, t in case.inputs().items()}
    assert torch.cuda.current_device() == 0
    *outputs, mask = case.ours(inputs, return_dropout_mask=True)
    expected = case.reference(inputs, None, mask)
    torch.testing.assert_close(tuple(outputs), expected, rtol=2e-2, atol=2e-2)
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    assert all(t.grad.device == other for t in inputs.values())
    assert torch.cuda.current_device() == 0


# --- Errors ---------------------------------------------------------------------------------------


def _zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.float64}, "x0: got dtype torch.float64; supported: torch.float32, torch.f"),
        ({"x0": torch.int64}, "x0: got dtype torch.int64"),
        ({"x0": ()}, r"x0: got shape \[\]; supported: \[..., D\]"),
        ({"x0": (2, 0), "residual": (2, 0), "weight": (0,)}, r"x0: got shape \[2, 0\]"),
        ({"residual": (4,)}, r"residual: got shape \[4\]; supported: \[2, 4\], to fit x0 \[2, 4\]"),
        (
            {"residual": torch.float16},
            "residual: got dtype torch.float16; supported: torch.fl",
        ),
        ({"weight": (5,)}, r"weight: got shape \[5\]; supported: \[4\]"),
        ({"weight": torch.bfloat16}, "weight: got dtype torch.bfloat16; supported: torch.float32"),
        ({"bias": (3,)}, r"bias: got shape \[3\]"),
        ({"layerscale": (2,)}, r"layerscale: got shape \[2\]; supported: \[4\]"),
        ({"rowscale": (4,)}, r"rowscale: got shape \[4\]; supported: \[2\]"),
        ({"dropout_p": 1.0}, "dropout_p: got 1.0; supported: at least 0 and less than 1"),
        ({"dropout_p": -0.1}, "dropout_p: got -0.1"),
        ({"dropout_p": float("nan")}, "dropout_p: got nan"),
        ({"epsilon": -1.0}, "epsilon: got -1.0; supported: at least 0"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    arguments: dict = {
        "x0": _zeros(2, 4), "residual": _zeros(2, 4), "weight": _zeros(4), "bias": None,
        "dropout_p": 0.0, "epsilon": 1e-5,
    }  # fmt: skip
    for name, change in changes.items():
        if isinstance(change, torch.dtype):
            change = arguments[name].to(change)
        elif isinstance(change, tuple):
            change = _zeros(*change)
        arguments[name] = change
    with pytest.raises(ValueError, match=message):
        ln.dropout_add_layer_norm(**arguments)


def test_bias_must_have_the_dtype_of_weight() -> None:
    x0 = _zeros(2, 4, dtype=BF16)
    with pytest.raises(ValueError, match=r"bias: got dtype torch.bfloat16; supported: weight's"):
        ln.layer_norm(x0, _zeros(4), _zeros(4, dtype=BF16), 1e-5)


def test_rowscale_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="rowscale: requires grad"):
        ln.dropout_add_layer_norm(
            _zeros(2, 4), None, _zeros(4), None, 0.0, 1e-5, rowscale=_zeros(2).requires_grad_()
        )


def test_devices_must_agree() -> None:
    other = torch.zeros(4, device="cpu" if DEVICE.type == "cuda" else "meta")
    with pytest.raises(ValueError, match=r"weight: is on .*; supported: x's device"):
        ln.layer_norm(_zeros(2, 4), other, None, 1e-5)
