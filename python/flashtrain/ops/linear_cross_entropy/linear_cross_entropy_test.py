"""linear_cross_entropy against its reference, and inside torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flashtrain.ops import linear_cross_entropy as ops
from flashtrain.ops.cross_entropy import CrossEntropyLoss
from flashtrain.ops.cross_entropy.cases import (
    BF16,
    FP16,
    FP32,
    IGNORE,
    LinearCase,
    check_linear,
)
from flashtrain.ops.linear_cross_entropy import linear_cross_entropy
from flashtrain.testing.devices import DEVICE, cuda_only, needs_gpu_memory, poisoned_memory

COMPILE_BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 rows, so that small problems have many, and a last one that is not full."""
    monkeypatch.setattr(ops, "_BUFFER_BYTES", 1)
    monkeypatch.setattr(ops, "_LEAST_CHUNK_BYTES", 1)
    monkeypatch.setattr(ops, "_CHUNK_ROWS_MULTIPLE", 8)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("shape", [(1, 16), (64, 1), (9, 33), (3, 7, 64), (100, 24)])
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for classes, bias in ((1, False), (40, True), (97, False)):
        check_linear(LinearCase(shape, dtype, classes=classes, bias=bias))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("smoothing", "scale", "z"), [*itertools.product((0.0, 0.1), (1.0, 0.7), (0.0, 1e-2))]
)
def test_options(smoothing, scale, z, dtype, reduction) -> None:
    check_linear(
        LinearCase(
            (30, 48),
            dtype,
            torch.int32 if scale == 1.0 else torch.int64,
            label_smoothing=smoothing,
            logit_scale=scale,
            lse_square_scale=z,
            vocab_size=90,
            classes=96,
            bias=True,
            reduction=reduction,
        )
    )


@pytest.mark.usefixtures("small_chunks")
def test_float32_parameters() -> None:
    for dtype in (FP16, BF16):
        case = LinearCase((20, 32), dtype, weight=FP32, bias=True)
        check_linear(case)


def test_one_chunk_of_the_real_size() -> None:
    check_linear(LinearCase((40, 64), BF16, classes=50257))


def test_chunks() -> None:
    """As many rows as fit beside dweight; about equal chunks; never less than a tile."""
    assert ops.chunk_rows(16384, 50304, 1024, 2) == 4096
    assert ops.chunk_rows(16384, 50304, 2048, 2) == 2048
    assert ops.chunk_rows(16384, 50304, 8192, 2) == 2048
    assert ops.chunk_rows(1000, 50304, 1024, 2) == 1000
    assert ops.chunk_rows(4200, 50304, 1024, 2) == 2176
    assert ops.chunk_rows(16384, 2**22, 64, 4) == 128
    assert ops.chunk_rows(0, 100, 64, 4) == 1
    for rows in (1, 127, 5000, 16384, 99999):
        for columns in (10, 50257, 128256, 10**7):
            for features in (64, 768, 5120):
                size = ops.chunk_rows(rows, columns, features, 2)
                tile = 128 * columns * 2
                buffers = max(ops._BUFFER_BYTES - 4 * columns * features, ops._LEAST_CHUNK_BYTES)
                assert size * columns * 2 <= max(buffers, tile)


@pytest.mark.usefixtures("small_chunks")
def test_loss_only() -> None:
    case = LinearCase((3, 9, 32), BF16, bias=True, lse_square_scale=0.01)
    tensors, labels = case.tensors(), case.labels_of()
    with_grad = case.ours(tensors, labels)
    with torch.no_grad():
        without = case.ours(tensors, labels)
        losses, _ = case.ours(tensors, labels, reduction="none")
    torch.testing.assert_close(without, with_grad)
    assert not without[0].requires_grad
    assert losses.shape == (3, 9)
    assert (losses[labels == IGNORE] == 0).all()
    torch.testing.assert_close(losses.sum() / (labels != IGNORE).sum(), with_grad[0])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
def test_frozen_inputs(trained: tuple[str, ...]) -> None:
    case = LinearCase((20, 32), BF16, bias=True)
    full, labels = case.tensors(), case.labels_of()
    case.ours(full, labels)[0].backward()
    part = {n: t.detach().requires_grad_(n in trained) for n, t in full.items()}
    case.ours(part, labels)[0].backward()
    for name, tensor in part.items():
        if name in trained:
            torch.testing.assert_close(tensor.grad, full[name].grad)
        else:
            assert tensor.grad is None


def test_no_rows_and_all_ignored() -> None:
    for rows in (0, 4):
        case = LinearCase((rows, 16), BF16, bias=True)
        tensors = case.tensors()
        labels = torch.full((rows,), IGNORE, device=DEVICE)
        loss, z_loss = case.ours(tensors, labels)
        assert loss == 0
        assert z_loss == 0
        loss.backward()
        assert all((t.grad == 0).all() for t in tensors.values())


@pytest.mark.usefixtures("small_chunks")
def test_gradients_of_float16_do_not_vanish() -> None:
    """The mean over many rows divides by their number; before rounding that would leave zeros."""
    case = LinearCase((4000, 8), FP16, classes=3000)
    tensors, labels = case.tensors(), case.labels_of()
    scale = 2.0**16  # a loss scale
    (case.ours(tensors, labels)[0] * scale).backward()
    doubles = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    (case.reference(doubles, labels, torch.float64)[0] * scale).backward()
    for name, tensor in tensors.items():
        error = (tensor.grad.double() - doubles[name].grad).norm() / doubles[name].grad.norm()
        assert error < 2e-3, name


@pytest.mark.usefixtures("small_chunks")
def test_labels_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LinearCase((20, 16), FP32)
    tensors, labels = case.tensors(), case.labels_of()
    labels[11] = 40
    if DEVICE.type == "cuda":
        assert case.ours(tensors, labels)[0].isnan()
        monkeypatch.setenv("FLASHTRAIN_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match=r"labels\[11\] is 40; a label must be in \[0, 40\)"):
        case.ours(tensors, labels)


# --- Inside torch ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_inputs(reduction: str) -> None:
    case = LinearCase((5, 6, 32), BF16, reduction=reduction)
    tensors, labels = case.tensors(), case.labels_of()
    strided = {
        "hidden": torch.stack([tensors["hidden"].detach()] * 2, 2)[:, :, 1],
        "weight": tensors["weight"].detach().t().contiguous().t(),
    }
    if reduction == "none":
        with torch.no_grad():
            torch.testing.assert_close(case.ours(strided, labels), case.ours(tensors, labels))
        return
    for tensor in strided.values():
        tensor.requires_grad_()
    case.ours(tensors, labels)[0].backward()
    case.ours(strided, labels)[0].backward()
    for name, tensor in strided.items():
        torch.testing.assert_close(tensor.grad, tensors[name].grad, rtol=2**-6, atol=1e-4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_autocast(dtype: torch.dtype) -> None:
    """hidden is converted; the gradient of a float32 weight keeps its float32 sum."""
    case = LinearCase((20, 32), dtype, weight=FP32)
    tensors, labels = case.tensors(), case.labels_of()
    low = {n: t.detach().to(BF16).requires_grad_() for n, t in tensors.items()}
    with torch.autocast(DEVICE.type, BF16):
        loss, _ = case.ours(tensors, labels)
    loss.backward()
    expected, _ = case.ours(low, labels)
    expected.backward()
    assert torch.equal(loss, expected)
    for name, tensor in tensors.items():
        assert tensor.grad.dtype == tensor.dtype
        assert torch.equal(tensor.grad.to(BF16), low[name].grad)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    case = LinearCase((2, 6, 32), FP32, bias=True)

    def model(tensors: dict[str, Tensor], labels: Tensor) -> Tensor:
        hidden = tensors["hidden"].tanh() * 2.0
        return case.ours(tensors | {"hidden": hidden}, labels)[0] * 3.0

    compiled = torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True, dynamic=dynamic)
    for shape in ((2, 6, 32), (3, 8, 32)):
        tensors = LinearCase(shape, FP32, bias=True).tensors()
        labels = LinearCase(shape, FP32).labels_of()
        leaves = list(tensors.values())
        expected, loss = model(tensors, labels), compiled(tensors, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
        )


def _op_samples() -> dict[str, tuple]:
    hidden = torch.randn(3, 5, 16, device=DEVICE)
    weight, bias = torch.randn(24, 16, device=DEVICE), torch.randn(24, device=DEVICE)
    labels = torch.randint(0, 20, (3, 5), device=DEVICE)
    options = (0.1, 0.5, 0.01, -100, 0, 20)
    low = hidden.to(BF16).transpose(0, 1)
    return {
        "linear_cross_entropy_forward": (hidden, weight, bias, labels, *options),
        "linear_cross_entropy_forward_backward": (
            hidden, weight, bias, labels, hidden.new_ones(()), *options, [True] * 3,
        ),
        "linear_cross_entropy_forward_backward (low)": (
            low, weight, None, labels.t(), hidden.new_ones(()), *options, [True, False, False],
        ),
        "scale_into": (weight, torch.tensor(0.3, device=DEVICE), weight.to(BF16)),
    }  # fmt: skip


@pytest.mark.parametrize("name", _op_samples())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.flashtrain, name.split()[0]).default
    torch.library.opcheck(op, _op_samples()[name])


def test_a_second_backward_is_refused() -> None:
    case = LinearCase((4, 16), FP32)
    loss, _ = case.ours(case.tensors(), case.labels_of())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@cuda_only
def test_cuda_graph_capture() -> None:
    case = LinearCase((300, 64), BF16, classes=1000)
    tensors, labels = case.tensors(), case.labels_of()

    def step() -> tuple[Tensor, ...]:
        loss, _ = case.ours(tensors, labels)
        return loss, *torch.autograd.grad(loss, list(tensors.values()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up, outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors["hidden"].copy_(case.tensors(seed=5)["hidden"])
    graph.replay()
    torch.testing.assert_close(captured, step())


@needs_gpu_memory(10)
def test_memory() -> None:
    """16,384 x 2,048 x 50,304 in bfloat16: 0.7 GiB, gradients included; logits alone are 1.5."""
    case = LinearCase((16384, 2048), BF16, classes=50304)
    tensors, labels = case.tensors(), case.labels_of()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.ours(tensors, labels)[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 0.7 * 2**30


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.float64}, "hidden: got dtype torch.float64; supported: torch.float32, t"),
        ({"hidden": (2, 3)}, r"weight: got shape \[6, 4\]; supported: \[V, 3\], to fit hidden"),
        ({"weight": (6,)}, r"weight: got shape \[6\]; supported: \[V, 4\]"),
        ({"weight": (0, 4)}, r"weight: got shape \[0, 4\]"),
        ({"weight": torch.bfloat16}, "weight: got dtype torch.bfloat16; supported: torch.float32"),
        ({"bias": (5,)}, r"bias: got shape \[5\]; supported: \[6\]"),
        ({"labels": (3,)}, r"labels: got shape \[3\]; supported: \[2\]"),
        ({"labels": torch.float32}, "labels: got dtype torch.float32"),
        ({"reduction": "avg"}, "reduction: got 'avg'; supported: mean, sum, none"),
        ({"logit_scale": -1.0}, "logit_scale: got -1.0"),
        ({"vocab_size": 7}, "vocab_size: got 7; supported: 1 to 6"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    arguments: dict = {
        "hidden": torch.zeros(2, 4, device=DEVICE),
        "weight": torch.zeros(6, 4, device=DEVICE),
        "labels": torch.zeros(2, dtype=torch.int64, device=DEVICE),
    }
    for name, change in changes.items():
        if isinstance(change, torch.dtype):
            change = arguments[name].to(change)
        elif isinstance(change, tuple):
            change = torch.zeros(
                change, dtype=arguments.get(name, arguments["hidden"]).dtype, device=DEVICE
            )
        arguments[name] = change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_no_reduction_has_no_gradient() -> None:
    case = LinearCase((4, 8), FP32)
    with pytest.raises(ValueError, match="reduction: got 'none' and an input that requires grad"):
        case.ours(case.tensors(), case.labels_of(), reduction="none")


def test_as_cross_entropy_of_the_logits() -> None:
    case = LinearCase((4, 8), FP32, bias=True)
    tensors, labels = case.tensors(), case.labels_of()
    logits = torch.nn.functional.linear(*tensors.values())
    torch.testing.assert_close(
        linear_cross_entropy(**tensors, labels=labels), CrossEntropyLoss()(logits, labels)
    )
