"""The fuzzer itself: what it must find in ops that are wrong."""

from __future__ import annotations

import ctypes
import os
import random
import time

import pytest
import torch
from torch import Tensor

from flashtrain.testing import fuzz


def _is_vector(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 1 and not x.is_sparse


def halve(x: Tensor, scale: float = 1.0) -> Tensor:
    """The op under test; FAULT in the environment says what is wrong with it."""
    fault = os.environ.get("FAULT")
    if not _is_vector(x):
        if fault == "nameless error":
            raise ValueError("no")
        if fault == "wrong kind of error":
            raise KeyError("x")
        if fault != "takes nonsense":
            raise ValueError("x: supported: a vector of floats")
        return torch.zeros(3)
    if not isinstance(scale, (int, float)) or not abs(scale) < 1e6:
        raise TypeError("scale: supported: a number below a million")
    if x.shape[0] == 5:
        if fault == "crash":
            ctypes.string_at(0)
        if fault == "hang":
            time.sleep(600)
        if fault == "wrong number":
            return x * 0.51 * scale
        if fault == "wrong dtype":
            return (x * 0.5 * scale).double()
        if fault == "refuses":
            raise ValueError("x: no")
        if fault == "unwritten":
            return x * float("nan")
        if fault == "wrong gradient":
            return x * 0.5 * scale + (x - x.detach())
    return x * 0.5 * scale


def _reference(arguments: dict, results: list) -> list[fuzz.Expected]:
    x = arguments["x"]
    assert x.dim() == 1
    assert x.is_floating_point()
    assert not x.is_sparse
    dtype = torch.float32 if x.requires_grad else x.dtype
    return [fuzz.Expected(x.double() / 2 * arguments["scale"], dtype)]


def draw(rng: random.Random) -> fuzz.Call:
    x = fuzz.tensor(rng, (rng.randrange(7),), torch.float32, requires_grad=True)
    return fuzz.spoiled(rng, fuzz.Call(halve, {"x": x, "scale": 2.0}, _reference))


def _run(monkeypatch: pytest.MonkeyPatch, fault: str, timeout: float = 60) -> str:
    monkeypatch.setenv("FAULT", fault)
    return fuzz.run_in_process("flashtrain.testing.fuzz_test", seed=3, calls=200, timeout=timeout)


def test_a_right_op_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    line = _run(monkeypatch, "")
    assert "200 calls" in line
    assert "seed 3" in line


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", r"seed 3, call \d+: halve\(x=float32\[5\].*the process ended with SIGSEGV"),
        ("wrong number", r"call \d+: halve\(x=float32\[5\].*result 0 is off by"),
        ("wrong dtype", "result 0 is float64"),
        ("refuses", "well-formed: refused: ValueError: x: no"),
        ("unwritten", "result 0 is .*nan"),
        ("wrong gradient", "the gradient of x is off by"),
        ("nameless error", "an error that names no argument: ValueError: no"),
        ("wrong kind of error", "raised KeyError"),
        ("takes nonsense", "malformed: taken, though the reference cannot"),
    ],
)
def test_faults_are_found(monkeypatch: pytest.MonkeyPatch, fault: str, message: str) -> None:
    with pytest.raises(fuzz.OpError, match=message):
        _run(monkeypatch, fault)


def test_a_call_that_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fuzz.OpError, match=r"call \d+: halve\(x=float32\[5\].*still running after"):
        _run(monkeypatch, "hang", timeout=10)
