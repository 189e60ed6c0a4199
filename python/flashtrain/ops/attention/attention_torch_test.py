"""attention inside torch: gradients, opcheck, compile, graphs, threads, errors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops import attention as attn
from flashtrain.ops.attention.cases import (
    BF16,
    FP32,
    NATIVE,
    Case,
    attend,
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


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [("q",), ("k",), ("v",), ("q", "k"), ("k", "v")], ids=" ".join)
def test_frozen_inputs(frozen: tuple[str, ...]) -> None:
    case = Case()
    inputs = case.inputs()
    full = results_and_gradients(inputs, case.ours(inputs))
    part = {n: t.detach().requires_grad_(n not in frozen) for n, t in inputs.items()}
    for name, value in results_and_gradients(part, case.ours(part)).items():
        assert torch.equal(value, full[name]), name


def test_lse_has_no_gradient() -> None:
    case = Case(1, dtype=FP32)
    _, lse, _ = case.ours(case.inputs(), return_attn_probs=True)
    assert not lse.requires_grad


# --- torch's machinery ----------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(), ((300, 300), (41, 41), (7, 90))], ids=["batch", "varlen"])
def test_twice_the_same_bits(lengths) -> None:
    case = Case(2, 300, 300, 4, 2, lengths=lengths, dropout_p=0.1)
    inputs = case.inputs()
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(results_and_gradients(inputs, case.ours(inputs)))
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU threads")
def test_same_bits_for_any_number_of_threads() -> None:
    case = Case(2, 300, 300, 4, 2, dtype=FP32)
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


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU instructions")
@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_every_instruction_set(isa: str) -> None:
    """In a process of its own, as the instruction set is found once; v4 where the CPU has it."""
    program = (
        "from flashtrain.ops.attention.cases import *\n"
        "check(Case(2, 90, 110, 4, 2, 40, softcap=5.0, alibi=True, dropout_p=0.2))\n"
        "check(Case(1, 65, 65, dtype=FP32))\n"
    )
    environment = os.environ | {"FLASHTRAIN_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def _op_samples() -> dict[str, tuple]:
    q, k, v, out, dout = torch.randn(5, 2, 20, 4, 16, device=DEVICE, dtype=BF16)
    lse = torch.randn(2, 4, 20, device=DEVICE)
    state = torch.tensor([1, 2], device=DEVICE)
    slopes = torch.rand(4, device=DEVICE)
    cu_seqlens = torch.tensor([0, 5, 20, 40], dtype=torch.int32, device=DEVICE)
    batch = (None, None, slopes, state, 20, 20, 0.25, 5.0, 9, 0, 0.5)
    varlen = (cu_seqlens, cu_seqlens, None, None, 20, 20, 0.25, 0.0, -1, -1, 0.0)
    flat = [t.flatten(0, 1) for t in (dout, q, k, v, out)]
    return {
        "attention_forward": (q, k[:, :, :2], v[:, :, :2], *batch),
        "attention_forward (varlen)": (*flat[1:4], *varlen),
        "attention_backward": (dout, q, k[:, :, :2], v[:, :, :2], out, lse, *batch),
        "attention_backward (varlen)": (*flat, lse.transpose(0, 1).flatten(1), *varlen),
    }


@pytest.mark.parametrize("name", _op_samples())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.flashtrain, name.split()[0]).default
    torch.library.opcheck(op, _op_samples()[name])


@pytest.mark.parametrize("backend", [NATIVE, None], ids=["native", "chosen"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("lengths", [(), ((60, 60), (4, 4))], ids=["batch", "varlen"])
def test_compile(lengths, dynamic: bool, backend: str | None) -> None:
    torch._dynamo.reset()
    case = Case(lengths=lengths, backend=backend)

    def model(inputs: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.gelu(case.ours(inputs))

    compiled = torch.compile(model, backend=COMPILE_BACKEND, fullgraph=True, dynamic=dynamic)
    for length in (64, 96):
        if not lengths:
            case = dataclasses.replace(case, seqlen_q=length, seqlen_k=length)
        inputs = case.inputs()
        expected = results_and_gradients(inputs, model(inputs))
        results = results_and_gradients(inputs, compiled(inputs))
        # The code that inductor generates for gelu may round bfloat16 otherwise than torch.
        torch.testing.assert_close(results, expected, rtol=2e-2, atol=2e-2)


def test_compile_with_dropout() -> None:
    torch._dynamo.reset()
    case = Case(dtype=FP32, dropout_p=0.5)
    inputs = case.inputs()
    compiled = torch.compile(case.ours, backend=COMPILE_BACKEND, fullgraph=True)
    torch.manual_seed(3)
    first = compiled(inputs)
    assert not torch.equal(compiled(inputs), first)
    torch.manual_seed(3)
    assert torch.equal(compiled(inputs), first)


def test_checkpointing_repeats_the_mask() -> None:
    case = Case(dtype=FP32, dropout_p=0.5)
    inputs = case.inputs()
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(case.ours, inputs, use_reentrant=False)
        else:
            out = case.ours(inputs)
        runs.append(results_and_gradients(inputs, out))
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


def test_inference_mode_and_meta_tensors() -> None:
    case = Case(dropout_p=0.1)
    inputs = {n: t.detach() for n, t in case.inputs().items()}
    with torch.inference_mode():
        assert case.ours(inputs).isfinite().all()
    out = attend(torch.empty(3, 2, 5, 4, 16, device="meta"), causal=True)
    assert out.is_meta
    assert out.shape == (2, 5, 4, 16)


@cuda_only
@pytest.mark.parametrize("backend", [NATIVE, None], ids=["native", "chosen"])
def test_cuda_graph_capture_draws_a_new_mask_at_each_replay(backend: str | None) -> None:
    case = Case(2, 128, 128, dropout_p=0.3, backend=backend)
    inputs = case.inputs()

    def step() -> tuple[Tensor, ...]:
        out = case.ours(inputs)
        return out, *torch.autograd.grad(out, list(inputs.values()), out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # warm-up, outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([t.clone() for t in captured])
        assert all(t.isfinite().all() for t in captured)
    assert not torch.equal(replays[0][0], replays[1][0])


@cuda_only
def test_runs_in_the_current_stream() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 1, 512, 4, 64, device=DEVICE, dtype=BF16)
    expected = attend(values, causal=True, backend=NATIVE)
    inputs = torch.zeros_like(values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long enough that a kernel in another stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        inputs.copy_(values)
        out = attend(inputs, causal=True, backend=NATIVE)
    stream.synchronize()
    assert torch.equal(out, expected)


@two_gpus_only
def test_second_device() -> None:
    case = Case(dropout_p=0.1)
    other = torch.device("cuda", 1)
    inputs = {n: t.detach().to(other).requires_grad_() for n, t in case.inputs().items()}
    assert torch.cuda.current_device() == 0
    for backend in (NATIVE, None):
        out = case.ours(inputs, backend=backend)
        grads = torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
        assert all(t.device == other and t.isfinite().all() for t in (out, *grads))
    assert torch.cuda.current_device() == 0


# --- Errors ---------------------------------------------------------------------------------------


def _zeros(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": torch.float64},
            "q: got dtype torch.float64; supported: torch.float32, torch.float16",
        ),
        ({"k": torch.float16}, "k: got dtype torch.float16; supported: q's, torch.float32"),
        ({"q": (2, 4, 8)}, r"q: got shape \[2, 4, 8\]; supported: \[B, seqlen, heads, D\]"),
        ({"v": (2, 4, 8)}, r"v: got shape \[2, 4, 8\]; supported"),
        ({"k": (2, 4, 2, 16)}, r"k: got shape \[2, 4, 2, 16\]; supported: the head dim of q"),
        ({"q": (2, 4, 2, 0), "k": (2, 4, 2, 0)}, r"k: got shape .*the head dim of q"),
        ({"q": (2, 4, 3, 8)}, "k: got 2 heads; supported: a divisor of q's 3 heads"),
        ({"v": (2, 5, 2, 8)}, r"v: got shape \[2, 5, 2, 8\]; supported: k's, \[2, 4, 2, 8\]"),
        ({"q": (3, 4, 2, 8)}, "k: got a batch of 2; supported: q's, 3"),
        ({"dropout_p": 1.0}, "dropout_p: got 1.0; supported: at least 0 and less than 1"),
        ({"softmax_scale": -1.0}, "softmax_scale: got -1.0; supported: at least 0, finite"),
        ({"softmax_scale": 1e39}, r"softmax_scale: got 1e\+39; supported: at least 0, finite"),
        ({"softmax_scale": float("nan")}, "softmax_scale: got nan"),
        ({"softcap": -1.0}, "softcap: got -1.0; supported: at least 0"),
        ({"softcap": float("inf")}, "softcap: got inf; supported: at least 0 .*, finite"),
        ({"window_size": (1,)}, "window_size: got 1 elements; supported: 2"),
        ({"alibi_slopes": (3,)}, r"alibi_slopes: got shape \[3\]; supported: \[2\] or \[2, 2\]"),
        ({"backend": "xformers"}, "backend: got 'xformers'; supported: None or one of cudnn, "),
        (
            {"backend": "flash_attn_2"},
            "backend: 'flash_attn_2' cannot take this call: it is not installed; those that can: ",
        ),
        (
            {"backend": "cpu" if DEVICE.type == "cuda" else "triton"},
            "cannot take this call: it (takes|is not installed)",
        ),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    arguments: dict = {name: _zeros(2, 4, 2, 8) for name in "qkv"}
    for name, change in changes.items():
        if isinstance(change, torch.dtype):
            change = arguments[name].to(change)
        elif isinstance(change, tuple) and name != "window_size":
            change = _zeros(*change)
        arguments[name] = change
    with pytest.raises(ValueError, match=message):
        attn.flash_attn_func(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cu_seqlens_q": [0, 3, 6]},
            "cu_seqlens_q: got dtype torch.int64; supported: torch.int32",
        ),
        (
            {"cu_seqlens_k": (0, 6)},
            r"cu_seqlens_k: got shape \[2\]; supported: cu_seqlens_q's, \[3",
        ),
        ({"q": (6, 2, 1, 8)}, r"q: got shape \[6, 2, 1, 8\]; supported: \[total, heads, D\]"),
        ({"block_table": (1, 1)}, "block_table: got a tensor; supported: None"),
    ],
)
def test_varlen_errors(changes: dict, message: str) -> None:
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)
    arguments: dict = {name: _zeros(6, 2, 8) for name in "qkv"}
    arguments |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    for name, change in changes.items():
        if name.startswith("cu_"):
            dtype = torch.int32 if isinstance(change, tuple) else torch.int64
            arguments[name] = torch.tensor(change, dtype=dtype, device=DEVICE)
        else:
            arguments[name] = _zeros(*change)
    with pytest.raises(ValueError, match=message):
        attn.flash_attn_varlen_func(**arguments, max_seqlen_q=3, max_seqlen_k=3)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on CUDA it would synchronise")
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ((1, 3, 6), r"cu_seqlens_q\[0\] is 1; it must be 0"),
        (
            (0, 5, 6),
            r"gives sequence 0 a length of 5; it must be in \[0, max_seqlen_q\], here \[0, 3",
        ),
        ((0, 3, 2), "gives sequence 1 a length of -1"),
        ((0, 3, 5), "cu_seqlens_q ends with 5; it must end with the number of rows, 6"),
    ],
)
def test_values_of_cu_seqlens(cu_seqlens: tuple[int, ...], message: str) -> None:
    bad = torch.tensor(cu_seqlens, dtype=torch.int32)
    good = torch.tensor([0, 3, 6], dtype=torch.int32)
    q, k, v = _zeros(3, 6, 2, 8)
    with pytest.raises(ValueError, match=message):
        attn.flash_attn_varlen_func(q, k, v, bad, good, 3, 3)


def test_packed_errors() -> None:
    with pytest.raises(
        ValueError, match=r"qkv: got shape \[1, 4, 2, 2, 8\]; supported: \[B, S, 3,"
    ):
        attn.flash_attn_qkvpacked_func(_zeros(1, 4, 2, 2, 8))
    with pytest.raises(
        ValueError, match=r"kv: got shape \[1, 4, 3, 2, 8\]; supported: \[B, Sk, 2,"
    ):
        attn.flash_attn_kvpacked_func(_zeros(1, 4, 2, 8), _zeros(1, 4, 3, 2, 8))


def test_devices_must_agree() -> None:
    q, k = _zeros(2, 1, 4, 2, 8)
    other = torch.zeros(1, 4, 2, 8, device="cpu" if DEVICE.type == "cuda" else "meta")
    with pytest.raises(ValueError, match=r"v: is on .*; supported: q's device"):
        attn.flash_attn_func(q, k, other)


def test_alibi_slopes_have_no_gradient() -> None:
    slopes = _zeros(2).requires_grad_()
    with pytest.raises(ValueError, match="alibi_slopes: requires grad"):
        attend(_zeros(3, 1, 4, 2, 8), alibi_slopes=slopes)


def test_probabilities_come_from_our_kernels_only() -> None:
    with pytest.raises(ValueError, match="'cudnn' does not return attention probabilities"):
        attend(_zeros(3, 1, 4, 2, 8), return_attn_probs=True, backend="cudnn")
