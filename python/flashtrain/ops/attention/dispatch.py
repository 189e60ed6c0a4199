"""Which implementation of attention takes a call: what each supports, and which is fastest.

    cudnn         cuDNN's fused attention, through torch
    flash_attn_2  the package flash-attn, where it is installed
    flash_attn_3  the package flash-attn-3, where it is installed
    flash_attn_4  the package flash-attn-4, where it is installed
    torch_flash   FlashAttention-2 as it is part of torch
    triton        our Triton kernels: every feature, every head dim to 256, float32 too
    cpu           our C++ kernels: every feature, every head dim

`choose` is a pure function of a `Request`, of what is installed and of measured times
(times.json, which experiments/benchmarks/bench_attention.py writes).
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

BACKENDS = (
    "cudnn",
    "flash_attn_3",
    "flash_attn_4",
    "flash_attn_2",
    "torch_flash",
    "triton",
    "cpu",
)

# Where nothing was measured. Before Hopper cuDNN is behind FlashAttention-2 (0.82 of it on an A100:
# huggingface/transformers#48163).
_ORDER_HOPPER = BACKENDS
_ORDER_BEFORE = ("flash_attn_2", "torch_flash", "cudnn", "triton", "flash_attn_4", "cpu")

TIMES_FILE = pathlib.Path(__file__).parent / "times.json"


class Request(NamedTuple):
    """All that the choice depends on."""

    device: str  # "cuda", "cpu"
    capability: int  # 90 for compute capability 9.0; 0 on the CPU
    dtype: torch.dtype
    head_dim: int
    seqlen_q: int  # the longest, with cu_seqlens
    seqlen_k: int
    empty: bool  # some tensor has no elements
    varlen: bool
    window_left: int  # -1: no limit
    window_right: int  # -1: no limit; 0 alone: causal
    softcap: bool
    alibi: bool
    dropout: bool
    deterministic: bool
    needs_grad: bool
    compiling: bool  # torch.compile is tracing
    transforming: bool = False  # torch.func is
    zero_scale: bool = False  # all scores are 0

    @property
    def is_full(self) -> bool:
        return self.window_left < 0 and self.window_right < 0

    @property
    def is_causal(self) -> bool:
        return self.window_left < 0 and self.window_right == 0


# --- What is here ---------------------------------------------------------------------------------

# What shows that a package is there, and the module that is used. flash-attn-4 may be there without
# flash-attn 2, in the same folder.
_PACKAGES = {
    "triton": ("triton", "flashtrain.ops.attention.triton"),
    "flash_attn_2": ("flash_attn_2_cuda", "flash_attn"),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_interface"),
    "flash_attn_4": ("flash_attn.cute", "flash_attn.cute"),
}
_PEER_ARGUMENTS = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}


def _is_here(module: str) -> bool:
    """Whether a module can be found. Nothing is imported, not even the package around it."""
    package, _, name = module.rpartition(".")
    try:
        spec = importlib.util.find_spec(package or name)
    except ValueError:  # it is imported, by something that gave it no spec
        return True
    if not package or spec is None:
        return spec is not None
    folders = spec.submodule_search_locations
    return importlib.machinery.PathFinder.find_spec(module, folders) is not None


def installed() -> frozenset[str]:
    """Names of BACKENDS whose code is here, whatever the device. Whether it works is `fault`'s."""
    names = {"cpu"} | {name for name, (module, _) in _PACKAGES.items() if _is_here(module)}
    if torch.version.cuda is not None:
        names |= {"cudnn", "torch_flash"}
    return frozenset(names)


@functools.cache
def _import_fault(backend: str) -> str | None:
    if backend not in _PACKAGES:
        return None
    try:
        module = importlib.import_module(_PACKAGES[backend][1])
        if backend == "triton":
            return None
        for function in (module.flash_attn_func, module.flash_attn_varlen_func):
            missing = _PEER_ARGUMENTS - set(inspect.signature(function).parameters)
            if missing:
                return f"its {function.__name__} has no {', '.join(sorted(missing))}"
    except Exception as error:  # whatever the import of a broken package may raise
        text = " ".join(str(error).split())[:200]
        return f"it cannot be imported ({type(error).__name__}: {text})"
    return None


@torch.compiler.assume_constant_result
def fault(backend: str) -> str | None:
    """What keeps a backend that is installed from working, in a few words; None: nothing.

    This imports its package, so it is for the backend that a call is about to use.
    """
    return _import_fault(backend)


# --- What each supports ---------------------------------------------------------------------------

# Features beyond those that all have: scale, causal with as many queries as keys, GQA, backward.
_FEATURES = {
    "cudnn": {"dropout"},
    "flash_attn_2": {
        "alibi_slopes", "causal with seqlen_q != seqlen_k", "cu_seqlens", "deterministic",
        "dropout", "softcap", "window_size",
    },
    "flash_attn_3": {
        "causal with seqlen_q != seqlen_k", "cu_seqlens", "deterministic", "softcap", "window_size",
    },
    "flash_attn_4": {
        "causal with seqlen_q != seqlen_k", "cu_seqlens", "deterministic", "softcap", "window_size",
    },
    "torch_flash": {
        "causal with seqlen_q != seqlen_k", "cu_seqlens", "dropout", "window_size",
    },
}  # fmt: skip

# Those that our tests found right on an H100; of 80 the gradient of q is off by as much as it is
# long (4.0.0b36).
_FLASH_ATTN_4_HEAD_DIMS = (64, 96, 128)

_MIN_CAPABILITY = {"flash_attn_3": 90, "flash_attn_4": 90}


def _wanted(request: Request) -> list[str]:
    """The features of _FEATURES that a request needs."""
    features = []
    if request.dropout:
        features.append("dropout")
    if request.softcap:
        features.append("softcap")
    if request.alibi:
        features.append("alibi_slopes")
    if request.varlen:
        features.append("cu_seqlens")
    if request.deterministic:
        features.append("deterministic")
    if not (request.is_full or request.is_causal):
        features.append("window_size")
    if request.is_causal and not request.varlen and request.seqlen_q != request.seqlen_k:
        features.append("causal with seqlen_q != seqlen_k")
    return features


def why_not(backend: str, request: Request) -> str | None:
    """What keeps a backend from taking the request, in a few words; None: it can."""
    if backend == "cpu":
        return None if request.device == "cpu" else "it takes CPU tensors only"
    if request.device != "cuda":
        return "it takes CUDA tensors only"
    if backend == "triton":
        return None if request.head_dim <= 256 else "its head dim is at most 256"
    if request.capability < _MIN_CAPABILITY.get(backend, 80):
        needed = _MIN_CAPABILITY.get(backend, 80)
        return f"it needs compute capability {needed / 10}, this GPU has {request.capability / 10}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return "it takes float16 and bfloat16 only"
    # cuDNN takes 192 and 256 in both directions on Hopper (9.19, tried), elsewhere up to 128.
    max_head_dim = 128 if backend == "cudnn" and request.capability != 90 else 256
    if request.head_dim % 8 or request.head_dim > max_head_dim:
        return f"its head dim is a multiple of 8 and at most {max_head_dim}"
    if backend == "flash_attn_4" and request.head_dim not in _FLASH_ATTN_4_HEAD_DIMS:
        return f"its head dim is one of {', '.join(map(str, _FLASH_ATTN_4_HEAD_DIMS))}"
    if missing := [f for f in _wanted(request) if f not in _FEATURES[backend]]:
        return f"it has no {', '.join(missing)}"
    if request.empty:
        return "it takes no empty tensors"
    if request.zero_scale:  # FlashAttention masks before it scales: -inf * 0
        return "it takes no softmax_scale of 0"
    if backend == "cudnn" and request.seqlen_q == 1:
        return "it takes no sequence of one query"
    if backend == "flash_attn_2" and request.dropout and request.softcap:
        return "it has no dropout with softcap"
    if request.transforming:
        return "torch.func cannot transform it"
    if backend == "flash_attn_4" and request.compiling:
        return "torch.compile cannot trace it"
    return None


# --- The choice -----------------------------------------------------------------------------------


def read_times() -> list[dict[str, Any]]:
    """The rows of times.json: one for each measured case.

    capability, head_dim, seqlen, dropout: the case, causal, bfloat16;
    forward, forward_backward: milliseconds of device time by backend.
    """
    return json.loads(TIMES_FILE.read_text())["rows"]


def _nearest(rows: list[dict[str, Any]], head_dim: int, seqlen: int) -> dict[str, Any]:
    """The measured case most like this one: the head dim decides, then the length, by ratios."""
    # Plain loops: torch.compile traces this, and that of torch 2.11 knows no min with a key.
    nearest_head_dim, nearest_ratio = 0, math.inf
    for row in rows:
        larger, smaller = row["head_dim"], head_dim
        if larger < smaller:
            larger, smaller = smaller, larger
        if larger / smaller < nearest_ratio:
            nearest_head_dim, nearest_ratio = row["head_dim"], larger / smaller
    same = sorted(
        (row for row in rows if row["head_dim"] == nearest_head_dim), key=lambda row: row["seqlen"]
    )
    # seqlen may be symbolic there.
    for row, longer in itertools.pairwise(same):
        if seqlen <= math.isqrt(row["seqlen"] * longer["seqlen"]):
            return row
    return same[-1]


def fastest_first(request: Request, times: list[dict[str, Any]]) -> list[str]:
    """BACKENDS by the times of the nearest measured case; those without times after the others.

    cuDNN builds a plan for every new shape, which takes it 0.5 to 1 s in each direction (H100,
    9.19). Lengths that are no multiple of 64 come from data of many lengths, so there it is last.
    """
    order = _ORDER_HOPPER if request.capability >= 90 else _ORDER_BEFORE
    rows = [
        row
        for row in times
        if row["capability"] == request.capability and row["dropout"] == request.dropout
    ]
    measured: dict[str, float] = {}
    if rows:
        nearest = _nearest(rows, request.head_dim, request.seqlen_k)
        measured = nearest["forward_backward" if request.needs_grad else "forward"]
    many_shapes = request.seqlen_q % 64 != 0 or request.seqlen_k % 64 != 0
    return sorted(
        order,
        key=lambda name: (
            name == "cudnn" and many_shapes,
            measured.get(name, math.inf),
            order.index(name),
        ),
    )


def choose(
    request: Request,
    unusable: Mapping[str, str],
    times: list[dict[str, Any]],
    forced: str | None = None,
) -> str:
    """The fastest backend that can take the request, or `forced`.

    Args:
      request: the call.
      unusable: why, in a few words, of those of BACKENDS that are not to be taken.
      times: see `read_times`.
      forced: the only backend to be taken.

    Raises ValueError: the forced backend cannot take the request, or none can; the text says why.
    """
    if forced is not None and forced not in BACKENDS:
        supported = ", ".join(BACKENDS)
        raise ValueError(f"backend: got {forced!r}; supported: None or one of {supported}")
    reasons = {name: unusable.get(name) or why_not(name, request) for name in BACKENDS}
    able = [name for name in BACKENDS if reasons[name] is None]
    if forced is not None:
        if reasons[forced] is None:
            return forced
        instead = ", ".join(able) or "none"
        raise ValueError(
            f"backend: {forced!r} cannot take this call: {reasons[forced]}; those that can: "
            f"{instead}"
        )
    if not able:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"attention: no backend can take this call ({listed})")
    if len(able) == 1:
        return able[0]
    return next(name for name in fastest_first(request, times) if name in able)


def choose_working(
    request: Request, missing: Mapping[str, str], times: list[dict[str, Any]], forced: str | None
) -> str:
    """`choose`, past the backends whose import fails: those are tried in the order of the choice.

    Args:
      missing: as `unusable`, of those that are not installed.

    Raises ValueError: as `choose`.
    """
    unusable = dict(missing)
    while True:
        name = choose(request, unusable, times, forced)
        found = fault(name)
        if found is None:
            return name
        unusable[name] = found
