"""Which backend takes a call: the rules, the committed times, and the backends that are here."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.ops import attention as attn
from flashtrain.ops.attention import dispatch, external
from flashtrain.ops.attention.cases import BF16, FP16, FP32, Case, check, results_and_gradients
from flashtrain.ops.reference import attention as reference
from flashtrain.testing.devices import DEVICE, cuda_only

GPU_BACKENDS = [name for name in dispatch.BACKENDS if name != "cpu"]
WITH_TORCH = frozenset({"cudnn", "torch_flash", "triton", "cpu"})


def request(**changes) -> dispatch.Request:
    """A training step of GPT-2 on an H100."""
    plain = dispatch.Request(
        device="cuda", capability=90, dtype=BF16, head_dim=64, seqlen_q=1024, seqlen_k=1024,
        empty=False, varlen=False, window_left=-1, window_right=0, softcap=False, alibi=False,
        dropout=False, deterministic=False, needs_grad=True, compiling=False,
    )  # fmt: skip
    return plain._replace(**changes)


def choose(available=WITH_TORCH, forced=None, times=None, **changes) -> str:
    times = dispatch.read_times() if times is None else times
    missing = dict.fromkeys(set(dispatch.BACKENDS) - set(available), "it is not installed")
    return dispatch.choose(request(**changes), missing, times, forced)


# --- The rules ------------------------------------------------------------------------------------


def test_cuda_features() -> None:
    assert choose() == "cudnn"
    assert choose(softcap=True) == "triton"
    assert choose(alibi=True) == "triton"
    assert choose(deterministic=True) == "triton"
    assert choose(dtype=FP32) == "triton"
    assert choose(head_dim=65) == "triton"
    assert choose(empty=True) == "triton"
    assert choose(zero_scale=True) == "triton"
    for changes in ({"varlen": True}, {"window_left": 128}, {"seqlen_q": 512}):
        assert choose(**changes) in ("torch_flash", "triton")
        assert choose(WITH_TORCH - {"triton"}, **changes) == "torch_flash"
    assert choose(seqlen_q=512, window_right=-1) == "cudnn"


def test_cudnn_is_left_to_shapes_that_come_again() -> None:
    assert choose(seqlen_q=1088, seqlen_k=1088) == "cudnn"
    assert choose(seqlen_q=1089, seqlen_k=1089) != "cudnn"
    assert choose({"cudnn"}, seqlen_q=1089, seqlen_k=1089) == "cudnn"
    assert choose(forced="cudnn", seqlen_q=1089, seqlen_k=1089) == "cudnn"


def test_before_hopper_and_without_times() -> None:
    assert choose(capability=80) == "torch_flash"
    assert choose(WITH_TORCH | {"flash_attn_2"}, capability=80) == "flash_attn_2"
    assert choose(capability=75, dtype=FP16) == "triton"
    assert choose(times=[]) == "cudnn"


def test_cpu() -> None:
    assert choose(device="cpu", capability=0) == "cpu"
    assert choose(device="cpu", capability=0, head_dim=1000, softcap=True, varlen=True) == "cpu"


def test_packages_where_they_are_installed() -> None:
    everything = frozenset(dispatch.BACKENDS)
    assert choose(everything, softcap=True, times=[]) == "flash_attn_3"
    assert choose(everything, alibi=True, times=[]) == "flash_attn_2"
    assert choose({"flash_attn_4", "triton"}, times=[]) == "flash_attn_4"
    assert choose({"flash_attn_4", "triton"}, times=[], compiling=True) == "triton"
    assert choose({"flash_attn_4", "triton"}, times=[], head_dim=80) == "triton"
    assert choose({"flash_attn_2", "triton"}, times=[], softcap=True, dropout=True) == "triton"


def test_a_forced_backend() -> None:
    assert choose(forced="triton") == "triton"
    for forced, changes, message in (
        ("cudnn", {"softcap": True}, "it has no softcap; those that can: triton"),
        ("cudnn", {"seqlen_q": 9}, "no causal with seqlen_q != seqlen_k; those that can: torch_fl"),
        ("flash_attn_4", {"head_dim": 80}, "it is not installed; those that can: cudnn"),
        ("torch_flash", {"dtype": FP32}, "it takes float16 and bfloat16 only"),
        ("cudnn", {"head_dim": 100}, "its head dim is a multiple of 8 and at most 256"),
        ("triton", {"head_dim": 300}, "its head dim is at most 256; those that can: none"),
        ("flash_attn_2", {}, "it is not installed; those that can: cudnn, torch_flash, triton"),
        ("cpu", {}, "it takes CPU tensors only"),
        ("cudnn", {"device": "cpu"}, "it takes CUDA tensors only; those that can: cpu"),
        ("torch_flash", {"capability": 75}, "needs compute capability 8.0, this GPU has 7.5"),
        ("mine", {}, "got 'mine'; supported: None or one of cudnn, flash_attn_3"),
    ):
        with pytest.raises(ValueError, match="backend: ") as error:
            choose(forced=forced, **changes)
        assert message in str(error.value)


def test_no_backend() -> None:
    with pytest.raises(ValueError, match=r"no backend can take .*triton: its head dim is"):
        choose(head_dim=512)


# --- The committed times --------------------------------------------------------------------------


def test_times_are_well_formed() -> None:
    rows = dispatch.read_times()
    assert rows
    keys = [(r["capability"], r["head_dim"], r["seqlen"], r["dropout"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        for measured in (row["forward"], row["forward_backward"]):
            assert set(measured) <= set(GPU_BACKENDS), row
            assert {"cudnn", "torch_flash", "triton"} <= set(measured)
            assert all(ms > 0.0 for ms in measured.values())
        assert all(row["forward"][name] < ms for name, ms in row["forward_backward"].items())


@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "forward_backward"])
def test_the_measured_best_is_chosen(needs_grad: bool) -> None:
    for row in dispatch.read_times():
        measured = row["forward_backward" if needs_grad else "forward"]
        chosen = choose(
            frozenset(measured), capability=row["capability"], head_dim=row["head_dim"],
            seqlen_q=row["seqlen"], seqlen_k=row["seqlen"], dropout=row["dropout"],
            needs_grad=needs_grad,
        )  # fmt: skip
        assert measured[chosen] == min(measured.values()), row


def test_the_nearest_measured_case_decides() -> None:
    def row(head_dim: int, seqlen: int, best: str) -> dict:
        found = {name: 1.0 if name == best else 2.0 for name in ("cudnn", "torch_flash", "triton")}
        return {
            "capability": 90, "head_dim": head_dim, "seqlen": seqlen, "dropout": False,
            "forward": found, "forward_backward": found,
        }  # fmt: skip

    times = [row(64, 128, "torch_flash"), row(64, 4096, "cudnn"), row(128, 4096, "triton")]
    assert choose(times=times, seqlen_q=200, seqlen_k=200) == "torch_flash"
    assert choose(times=times, seqlen_q=1024, seqlen_k=1024) == "cudnn"
    assert choose(times=times, head_dim=128, seqlen_q=128, seqlen_k=128) == "triton"
    assert choose(times=times, head_dim=80) == "cudnn"
    # Nothing measured with dropout: the order without times.
    assert choose(times=times, head_dim=128, dropout=True) == "cudnn"


# --- The backends that are here -------------------------------------------------------------------


@cuda_only
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 256, 256, 4, 2),
        Case(2, 131, 131, 4, 4, 80),
        Case(2, 200, 200, 4, 2, 96, dtype=FP16),
        Case(1, 200, 200, 2, 2, 256),
        Case(2, 100, 256, 2, 2, causal=False),
        Case(2, 128, 256, 4, 2),
        Case(2, 256, 128, 4, 2),
        Case(1, 1, 77, 4, 2),
        Case(2, 256, 256, 4, 2, window=(40, 0)),
        Case(2, 256, 256, 4, 2, causal=False, window=(40, 10)),
        Case(heads=4, lengths=((100, 100), (0, 0), (33, 90), (156, 156))),
        Case(2, 200, 200, 4, 2, softcap=10.0),
        Case(2, 200, 200, 4, 2, alibi=True),
    ],
    ids=lambda case: case.__repr__()[5:-1].replace(" ", ""),
)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_every_backend_here(backend: str, case: Case) -> None:
    if backend not in dispatch.installed():
        pytest.skip(f"{backend} is not installed")
    case = dataclasses.replace(case, backend=backend)
    try:
        case.ours(case.inputs())
    except ValueError as error:
        pytest.skip(str(error))
    check(case)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inner_stride": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "odd_stride": lambda x: F.pad(x, (0, 1))[..., :-1],
    "odd_offset": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    "one_head_for_all": lambda x: x[:, :, :1].expand(x.shape),
}


@cuda_only
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_every_backend_takes_any_strides(backend: str, layout: str) -> None:
    if backend not in dispatch.installed():
        pytest.skip(f"{backend} is not installed")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 150, 4, 64, device=DEVICE, dtype=BF16)
    found = []
    for copied in (True, False):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        strided = [LAYOUTS[layout](x) for x in leaves]
        if copied:
            strided = [x.clone(memory_format=torch.contiguous_format) for x in strided]
        out = attn.flash_attn_func(strided[0], strided[1], strided[2], causal=True, backend=backend)
        found.append((out, *torch.autograd.grad(out.sum(), leaves)))  # of one element for all
    for contiguous, other in zip(*found, strict=True):
        torch.testing.assert_close(other, contiguous, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_copies_for_peers_are_traced(dynamic: bool) -> None:
    """torch.compile sees no storage offset where it meets it in Python."""
    torch._dynamo.reset()

    def model(x: Tensor, first: int) -> tuple[Tensor, tuple[int, ...]]:
        vectors = attn._vectors(x[..., first : first + 8])
        return vectors * 2, vectors.stride()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        x = torch.randn(rows, 4, 32, dtype=BF16, requires_grad=True)
        for first in (0, 1, 8, 9):
            out, stride = compiled(x, first)
            assert torch.equal(out, x[..., first : first + 8] * 2)
            assert stride == ((32, 8, 1) if first % 8 else (128, 32, 1))
            (gradient,) = torch.autograd.grad(out.sum(), x)
            assert gradient.sum() == 2 * rows * 4 * 8


@cuda_only
@pytest.mark.parametrize("backend", ["cudnn", "torch_flash"])
def test_dropout_of_torch(backend: str) -> None:
    """The mean over masks is the result without dropout."""
    case = Case(4, 128, 128, 8, 8, backend=backend)
    inputs = case.inputs()
    plain = case.ours(inputs)
    mean = torch.zeros_like(plain, dtype=FP32)
    for _ in range(200):
        mean += case.ours(inputs, dropout_p=0.2).float() / 200
    assert not torch.equal(case.ours(inputs, dropout_p=0.2), plain)
    error = ((mean - plain.float()).norm() / plain.float().norm()).item()
    # Of one mask 0.5; of the mean of 200, 0.035.
    assert error < 0.06


@cuda_only
def test_deterministic_algorithms_are_respected() -> None:
    case = Case(4, 512, 512, 8, 8, backend=None)
    inputs = case.inputs()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [results_and_gradients(inputs, case.ours(inputs)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


# --- The packages' signatures ---------------------------------------------------------------------


def _expected(q: Tensor, k: Tensor, v: Tensor, options: dict, window) -> Tensor:
    left, right = (-1 if size is None else size for size in window)
    return reference.attention(
        q, k, v, softmax_scale=options["softmax_scale"], causal=options["causal"],
        window_size=(left, right), softcap=options["softcap"],
        alibi_slopes=options.get("alibi_slopes"),
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (7, 0), (5, 3)])
def test_calls_of_the_packages(name: str, window, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' argument names, computing the reference."""
    none = None if name == "flash_attn_4" else -1

    def flash_attn_func(
        q, k, v, *, softmax_scale, causal, window_size, softcap, deterministic, **others
    ):
        allowed = {"dropout_p", "alibi_slopes"} if name == "flash_attn_2" else set()
        assert set(others) == allowed
        assert all(size is none or size >= 0 for size in window_size) or causal
        options = {"softmax_scale": softmax_scale, "causal": causal, "softcap": softcap} | others
        out = _expected(q, k, v, options, window_size)
        return out if name == "flash_attn_2" else (out, None)

    module: Any = types.ModuleType("stand_in")
    module.flash_attn_func = flash_attn_func
    module.cute = module
    target = "flash_attn_interface" if name == "flash_attn_3" else "flash_attn"
    monkeypatch.setitem(sys.modules, target, module)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    q, k, v = torch.randn(3, 2, 20, 4, 16)
    slopes = torch.rand(4) if name == "flash_attn_2" else None
    left, right = window
    call = external.Call(None, None, 20, 20, 0.3, left, right, 4.0, slopes, 0.0, True)
    expected, _ = reference.attention(
        q, k, v, softmax_scale=0.3, window_size=window, softcap=4.0, alibi_slopes=slopes
    )
    torch.testing.assert_close(external.PEERS[name](q, k, v, call), expected)


def test_the_front_uses_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def chosen(request, unusable, times, forced):
        seen.append(request)
        return "torch_flash"

    monkeypatch.setattr(dispatch, "choose", chosen)
    attn._remembered_choice.cache_clear()
    monkeypatch.setitem(attn.PEERS, "torch_flash", lambda q, k, v, call: (q, call))
    q, k, v = torch.zeros(3, 2, 20, 4, 16, device=DEVICE)
    out, call = attn.flash_attn_func(q, k, v, causal=True, window_size=(9, 4), softcap=2.0)
    assert out is q
    assert (call.window_left, call.window_right, call.softcap) == (9, 0, 2.0)
    assert seen[0].softcap
    assert not seen[0].needs_grad
    assert not seen[0].is_causal
    attn._remembered_choice.cache_clear()


# --- Packages that are there and do not work ------------------------------------------------------

BROKEN = {
    "raise ImportError('flash_attn_2_cuda: undefined symbol')": "ImportError: flash_attn_2_cuda: u",
    "raise OSError('libcudart.so.12: cannot open')": "OSError: libcudart.so.12: cannot open",
    "raise RuntimeError('built for\\n  torch 2.4')": "RuntimeError: built for torch 2.4",
    "import os; os.no_such_name": "AttributeError: module 'os' has no attribute 'no_such_name'",
    "1 +": "SyntaxError: invalid syntax",
    "": "AttributeError: module 'flash_attn' has no attribute 'flash_attn_func'",
    "def flash_attn_func(q, k, v, softmax_scale, causal): pass\n"
    "flash_attn_varlen_func = flash_attn_func": "its flash_attn_func has no deterministic, softcap",
}


@pytest.fixture
def broken(
    request: pytest.FixtureRequest, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """All three packages, each of which holds the parameter, in the path; what is said of them."""
    code, message = request.param
    for name in ("flash_attn", "flash_attn/cute"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    for name in ("flash_attn_2_cuda", "flash_attn_interface"):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_2_cuda", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    dispatch._import_fault.cache_clear()
    yield message
    dispatch._import_fault.cache_clear()
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("broken", BROKEN.items(), indirect=True, ids=BROKEN.values())
def test_a_package_that_does_not_import(broken: str) -> None:
    here = dispatch.installed()
    assert here >= {"flash_attn_2", "flash_attn_3", "flash_attn_4"}
    assert not {"flash_attn", "flash_attn_2_cuda", "flash_attn_interface"} & set(sys.modules)
    missing = dict.fromkeys(
        set(dispatch.BACKENDS) - here - WITH_TORCH | {"triton"}, "it is not installed"
    )
    times: list[dict] = []
    for changes, expected in (({}, "cudnn"), ({"varlen": True}, "torch_flash")):
        call = request(**changes)
        assert dispatch.choose_working(call, missing, times, None) == expected
    with pytest.raises(ValueError, match="backend: 'flash_attn_2' cannot take this call") as error:
        dispatch.choose_working(request(), missing, times, "flash_attn_2")
    assert broken in str(error.value)
    assert "\n" not in str(error.value)
    assert "those that can: " in str(error.value)
    with pytest.raises(ValueError, match="no backend can take this call") as listed:
        dispatch.choose_working(request(softcap=True, alibi=True), missing, times, None)
    assert broken in str(listed.value)


def test_a_working_package_is_taken(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "q, k, v, *, softmax_scale, causal, window_size, softcap, deterministic"
    (tmp_path / "flash_attn_interface.py").write_text(
        f"def flash_attn_func({arguments}): pass\ndef flash_attn_varlen_func({arguments}): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    dispatch._import_fault.cache_clear()
    assert "flash_attn_3" in dispatch.installed()
    missing = dict.fromkeys(set(dispatch.BACKENDS) - {"flash_attn_3", "cudnn"}, "no")
    assert dispatch.choose_working(request(varlen=True), missing, [], None) == "flash_attn_3"
    dispatch._import_fault.cache_clear()
    sys.modules.pop("flash_attn_interface", None)
