"""cross_entropy inside torch: in-place backward, opcheck, compile, graphs, streams, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtrain.ops.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from flashtrain.ops.cross_entropy import kernels as ops
from flashtrain.ops.cross_entropy.cases import BF16, FP16, FP32, Case, row_gradients
from flashtrain.testing.devices import DEVICE, cuda_only, poisoned_memory, two_gpus_only

# Inductor needs a C++ compiler for CPU code, and half a minute; aot_eager runs the same traced
# graphs, fakes included, without code generation.
COMPILE_BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


def test_inplace_backward_overwrites_the_logits_once() -> None:
    logits, labels = Case((4, 32), FP32).inputs()
    (expected,) = torch.autograd.grad(cross_entropy_loss(logits, labels)[0].sum(), logits)
    before = logits.detach().clone()
    hidden = logits * 1.0
    loss = cross_entropy_loss(hidden, labels, inplace_backward=True)[0].sum()
    assert torch.equal(hidden, before)
    (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == hidden.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    logits, labels = Case((4, 32), FP32).inputs()
    losses, _ = cross_entropy_loss(logits, labels)
    (grad,) = torch.autograd.grad(losses.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        grad.sum().backward()


def test_the_gradient_of_a_mean_is_not_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    strides = []
    run = ops._run_backward

    def spy(dlosses, *args):
        strides.append(dlosses.stride())
        return run(dlosses, *args)

    monkeypatch.setattr(ops, "_run_backward", spy)
    logits, labels = Case((2, 4, 32), FP32).inputs()
    CrossEntropyLoss()(logits, labels).backward()
    assert strides == [(0, 0)]


def _op_samples() -> dict[str, tuple]:
    logits = torch.randn(3, 5, 32, device=DEVICE, dtype=BF16)
    labels = torch.randint(0, 30, (3, 5), device=DEVICE)
    rows = torch.rand(3, 5, device=DEVICE) + 3.0
    options = (0.1, 0.5, 0.01, -100, 0, 30)
    return {
        "cross_entropy_forward": (logits, labels, None, *options, False),
        "cross_entropy_forward (known lse)": (
            logits.transpose(0, 1), labels.int().t(), rows.t(), 0.0, *options[1:], False,
        ),
        "cross_entropy_forward (partial)": (logits, labels, None, *options[:4], 32, 60, True),
        "cross_entropy_backward": (rows, logits, labels, rows, *options),
        "cross_entropy_backward_": (rows, logits.clone(), labels, rows, *options),
        "cross_entropy_forward_backward_": (logits.clone(), labels, rows, *options),
    }  # fmt: skip


@pytest.mark.parametrize("name", _op_samples())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.flashtrain, name.split()[0]).default
    torch.library.opcheck(op, _op_samples()[name])


def test_forward_and_backward_in_one_pass() -> None:
    for shape, dtype in (((7, 50), FP32), ((2, 3, 1001), BF16)):
        logits, labels = Case(shape, dtype).inputs()
        options = (0.1, 0.5, 0.01, -100, 0, shape[-1] - 5)
        labels = labels.clamp(max=shape[-1] - 6)
        losses, z_losses = cross_entropy_loss(
            logits, labels, None, *options[:4], vocab_size=options[-1]
        )
        dlosses = row_gradients(losses)
        (grad,) = torch.autograd.grad(losses, logits, dlosses)
        in_place = logits.detach().clone()
        results = ops.cross_entropy_forward_backward_(in_place, labels, dlosses, *options)
        assert torch.equal(results[0], losses)
        assert torch.equal(results[1], z_losses)
        torch.testing.assert_close(in_place, grad, rtol=2**-7 if dtype is BF16 else 1e-5, atol=1e-6)
        moved = torch.stack([logits.detach()] * 2, -1)[..., 0]  # columns apart
        ops.cross_entropy_forward_backward_(moved, labels, dlosses, *options)
        assert torch.equal(moved, in_place)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool, inplace: bool) -> None:
    loss_of = CrossEntropyLoss(label_smoothing=0.1, inplace_backward=inplace, vocab_size=60)

    def model(hidden: Tensor, labels: Tensor) -> Tensor:
        return loss_of(hidden.tanh() * 2.0, labels) * 3.0

    compiled = torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True, dynamic=dynamic)
    for shape in ((4, 6, 64), (3, 8, 64)):
        hidden, labels = Case(shape, FP32, vocab_size=60).inputs()
        expected = model(hidden, labels)
        loss = compiled(hidden, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
        )


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    for logits_dtype in (FP32, dtype):
        logits, labels = Case((4, 64), logits_dtype).inputs()
        plain = cross_entropy_loss(logits, labels)
        with torch.autocast(DEVICE.type, dtype):
            results = cross_entropy_loss(logits, labels)
        assert torch.equal(results[0], plain[0])
        assert results[0].dtype is FP32


def test_twice_the_same_bits() -> None:
    logits, labels = Case((300, 1000), BF16).inputs()
    runs = []
    for _ in range(2):
        losses, _ = cross_entropy_loss(logits, labels)
        runs.append((losses, *torch.autograd.grad(losses.sum(), logits)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_no_grad_and_meta_tensors() -> None:
    logits, labels = Case((4, 64)).inputs()
    with torch.inference_mode():
        assert cross_entropy_loss(logits.detach(), labels)[0].isfinite().all()
    losses, _ = cross_entropy_loss(logits.detach().to("meta"), labels.to("meta"))
    assert losses.is_meta
    assert losses.shape == (4,)


@cuda_only
def test_cuda_graph_capture() -> None:
    logits, labels = Case((64, 3000), BF16).inputs()
    loss_of = CrossEntropyLoss(label_smoothing=0.1)

    def step() -> tuple[Tensor, Tensor]:
        loss = loss_of(logits, labels)
        return loss, torch.autograd.grad(loss, logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up, outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            logits.copy_(Case((64, 3000), BF16).inputs(seed)[0])
        graph.replay()
        for got, expected in zip(captured, step()):
            assert torch.equal(got, expected)


@cuda_only
def test_runs_in_the_current_stream() -> None:
    rows, cols = 4096, 4096
    logits = torch.zeros(rows, cols, device=DEVICE, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    values = torch.randn(rows, cols, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long enough that a kernel in another stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            logits.copy_(values)
        loss = CrossEntropyLoss()(logits, labels)
        loss.backward()
    stream.synchronize()
    expected = torch.nn.functional.cross_entropy(values.requires_grad_(), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, values.grad)


@two_gpus_only
def test_second_device() -> None:
    other = torch.device("cuda", 1)
    logits, labels = Case((16, 128), BF16).inputs()
    expected = CrossEntropyLoss()(logits, labels)
    loss = CrossEntropyLoss()(logits.detach().to(other).requires_grad_(), labels.to(other))
    loss.backward()
    assert torch.equal(loss.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


# --- Errors ---------------------------------------------------------------------------------------


def _zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.float64}, "logits: got dtype torch.float64; supported: torch.float32"),
        ({"logits": ()}, r"logits: got shape \[\]; supported: at least one dimension"),
        ({"logits": (2, 0)}, r"logits: got shape \[2, 0\]"),
        ({"labels": (3,)}, r"labels: got shape \[3\]; supported: \[2\], one for each row of \[2, "),
        ({"labels": torch.float32}, "labels: got dtype torch.float32; supported: torch.int64, tor"),
        ({"precomputed_lse": (5,)}, r"precomputed_lse: got shape \[5\]"),
        ({"label_smoothing": 1.5}, "label_smoothing: got 1.5; supported: 0 to 1"),
        ({"label_smoothing": float("nan")}, "label_smoothing: got nan"),
        ({"logit_scale": 0.0}, "logit_scale: got 0.0; supported: more than 0"),
        ({"lse_square_scale": -1.0}, "lse_square_scale: got -1.0; supported: at least 0"),
        ({"vocab_size": 5}, "vocab_size: got 5; supported: 1 to 4"),
        ({"vocab_size": 0}, "vocab_size: got 0"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    arguments: dict = {"logits": _zeros(2, 4), "labels": _zeros(2, dtype=torch.int64)}
    for name, change in changes.items():
        if isinstance(change, torch.dtype):
            change = arguments[name].to(change)
        elif isinstance(change, tuple):
            dtype = arguments[name].dtype if name in arguments else FP32
            change = _zeros(*change, dtype=dtype)
        arguments[name] = change
    with pytest.raises(ValueError, match=message):
        cross_entropy_loss(**arguments)


def test_module_errors() -> None:
    with pytest.raises(ValueError, match="reduction: got 'avg'; supported: mean, sum, none"):
        CrossEntropyLoss(reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing: got 2"):
        CrossEntropyLoss(label_smoothing=2.0)


def test_devices_must_agree() -> None:
    other = torch.zeros(2, dtype=torch.int64, device="cpu" if DEVICE.type == "cuda" else "meta")
    with pytest.raises(ValueError, match=r"labels: is on .*; supported: .*, as the rows"):
        cross_entropy_loss(_zeros(2, 4), other)
