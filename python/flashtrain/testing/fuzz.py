"""Random calls of an op, well-formed and not: each must give an error or the right answer.

    python -m flashtrain.testing.fuzz flashtrain.ops.layer_norm.fuzz --seed=0 --calls=10000

A module of calls has `draw(rng: random.Random) -> Call`. They run in a process of their own, so
that a crash is found and told: call i of a seed is a pure function of the two, and the process
notes i before it makes the call. What is right:

  - an exception that is ValueError, TypeError or RuntimeError and whose message names an argument,
    or MemoryError, unless the call is well-formed;
  - anything but a crash where an argument is a FakeTensor, whose errors are torch's;
  - results of the reference's shapes, dtypes and numbers, and on some calls its gradients.

The device is that of flashtrain.testing.devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from flashtrain.testing.devices import DEVICE

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Of a number, relative to the largest of its tensor and to 1, by the lowest dtype of the call. Most
# right answers are far closer.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Expected(NamedTuple):
    """A right result: in float64, or bool or integers. A meta tensor: of this shape only."""

    value: Tensor
    dtype: torch.dtype


@dataclasses.dataclass
class Call:
    """One call.

    Attributes:
      function: the op.
      arguments: by name.
      reference: `(arguments, results) -> [Expected or None]` in plain torch, from the arguments as
        they were before the call, those that require grad in float64; `results` are the op's (a
        mask is not to be guessed). Raises where the arguments make no sense.
      well_formed: the op must not refuse it.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    reference: Callable[[dict[str, Any], list[Any]], Sequence[Expected | None]]
    well_formed: bool = True

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={describe(v)}" for name, v in self.arguments.items())
        kind = "well-formed" if self.well_formed else "malformed"
        return f"{self.function.__name__}({arguments}), {kind}"


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:80]
    text = f"{str(value.dtype)[6:]}{list(value.shape)}"
    text = "fake " * isinstance(value, FakeTensor) + "negative " * value.is_neg() + text
    if value.layout is not torch.strided:
        text += f" {value.layout}"
    elif not value.is_contiguous():
        text += f" strides {value.stride()}"
    return f"{text} on {value.device}" + " requires grad" * value.requires_grad


# --- Drawing --------------------------------------------------------------------------------------

_OTHER_DTYPES = (torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8)
_SCALARS: tuple[Any, ...] = (
    None, 0, 1, -1, 2, 256, 0.5, -0.5, 1e30, float("nan"), float("inf"), True, "0.1", 2**31 - 1,
    2**31, -(2**31) - 1, 2**32 + 1, 2**62, 2**63 - 1, -(2**63), 2**63, 10**400, [], [1, 2], (), {},
    b"x", object, 1j,
)  # fmt: skip
# Tensors that are not fake may come with those that are, as in a program that is being traced.
_FAKES = FakeTensorMode(allow_non_fake_inputs=True)


def tensor(
    rng: random.Random, shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False
) -> Tensor:
    """Normal numbers of torch's generator, in a layout of `rng`'s choice."""
    values = torch.randn(tuple(shape)).to(DEVICE, dtype)
    layout = rng.randrange(9)
    if layout == 0 and values.dim() > 0:
        values = torch.cat([values, values], -1)[..., : values.shape[-1]]
    elif layout == 1 and values.dim() > 1:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == 2:
        values = torch.stack([values, values], -1)[..., 0]
    elif layout == 3 and values.dim() > 1 and values.shape[0] > 1:
        values = values[:1].expand(values.shape)
    elif layout == 4:
        values = torch._neg_view(values)
    return values.detach().requires_grad_(requires_grad)


def upper_bound(rng: random.Random, longest: int) -> int:
    """Of lengths up to `longest`, which callers need not know: often that, sometimes far more."""
    # Grids of GPU kernels are as large as the bound.
    far = 2**31 - 1 if DEVICE.type == "cpu" else 5000
    return longest + rng.choice((0, 0, 0, 1, 70)) if rng.random() < 0.8 else far


def overlapping(rng: random.Random, value: Tensor) -> Tensor:
    """The same shape, in memory where several elements share an address, if there are several."""
    if value.numel() < 2:
        return value
    if rng.random() < 0.3:
        return value.contiguous().as_strided(value.shape, [1] * value.dim())
    dim = rng.choice([i for i in range(value.dim()) if value.shape[i] > 1])
    return value.narrow(dim, 0, 1).expand(value.shape)


def spoil(rng: random.Random, value: Any) -> Any:
    """Something else in place of an argument: often wrong, sometimes not."""
    if not isinstance(value, Tensor) or rng.random() < 0.3:
        return rng.choice(_SCALARS) if rng.random() < 0.8 else _any_tensor(rng)
    base = value.detach()
    dim = rng.randrange(max(base.dim(), 1))
    negatable = base.layout is torch.strided and base.dtype != torch.bool
    changes: list[Callable[[], Any]] = [
        lambda: base.to(rng.choice(_OTHER_DTYPES + FLOATS)),
        lambda: base.to("meta"),
        lambda: _FAKES.from_tensor(base),
        lambda: torch._neg_view(base) if negatable else base,
        lambda: overlapping(rng, base),
        lambda: base.to_sparse(),
        lambda: base.unsqueeze(dim),
        lambda: base.flatten(),
        lambda: base.select(dim, 0) if base.numel() and base.dim() else base,
        lambda: torch.cat([base, base], dim) if base.dim() else base,
        lambda: base.narrow(dim, 0, 0) if base.dim() else base,
        lambda: base.float().cpu().resolve_neg().numpy(),
        lambda: _any_tensor(rng),
    ]
    return rng.choice(changes)()


def _any_tensor(rng: random.Random) -> Tensor:
    shape = [rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randrange(4))]
    return torch.ones(shape, dtype=rng.choice(FLOATS + _OTHER_DTYPES), device=DEVICE)


def spoiled(rng: random.Random, call: Call) -> Call:
    """The call with one or two arguments spoiled, or, half of the times, as it is."""
    if rng.random() < 0.5:
        return call
    arguments = dict(call.arguments)
    for name in rng.sample(sorted(arguments), rng.choice((1, 1, 2))):
        arguments[name] = spoil(rng, arguments[name])
    return dataclasses.replace(call, arguments=arguments, well_formed=False)


# --- Judging --------------------------------------------------------------------------------------


class OpError(Exception):
    """What an op did wrong, in a line."""


def _compare(what: str, got: Any, expected: Expected | None, tolerance: float) -> None:
    if not isinstance(got, Tensor) or expected is None:
        if got is not expected:
            raise OpError(f"{what} is {describe(got)}, expected {expected}")
        return
    value, dtype = expected
    if got.shape != value.shape or got.dtype != dtype:
        raise OpError(f"{what} is {describe(got)}, expected {dtype} {list(value.shape)}")
    if got.is_meta or value.is_meta or got.numel() == 0:
        return
    exact = value.detach().to(dtype).double()
    ours = got.detach().double()
    if not torch.equal(ours.isfinite(), exact.isfinite()):
        raise OpError(f"{what} is {ours.tolist()}, expected {exact.tolist()}")
    exact, ours = exact[exact.isfinite()], ours[ours.isfinite()]
    if exact.numel() == 0:
        return
    scale = max(1.0, exact.abs().max().item())
    error = (ours - exact).abs().max().item()
    if error > scale * tolerance:
        raise OpError(f"{what} is off by {error:.2e}, of numbers up to {scale:.2e}")


def _check_gradients(
    arguments: dict[str, Any],
    doubles: dict[str, Any],
    results: list[Any],
    expected: list[Any],
    tolerance: float,
) -> None:
    leaves = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
    pairs = [
        (result, right.value)
        for result, right in zip(results, expected)
        if isinstance(result, Tensor)
        and result.requires_grad
        and right.value.requires_grad
        and not right.value.is_meta
    ]
    if not leaves or not pairs:
        return
    out_grads = [torch.randn(result.shape).to(result) for result, _ in pairs]
    try:
        ours = torch.autograd.grad(
            [result for result, _ in pairs], [arguments[n] for n in leaves], out_grads,
            allow_unused=True,
        )  # fmt: skip
    except Exception as error:
        raise OpError(f"backward raised {type(error).__name__}: {error}") from error
    exact = torch.autograd.grad(
        [value for _, value in pairs], [doubles[n] for n in leaves],
        [grad.double() for grad in out_grads], allow_unused=True,
    )  # fmt: skip
    for name, got, value in zip(leaves, ours, exact):
        if got is not None or value is not None:
            leaf = arguments[name]
            value = torch.zeros_like(doubles[name]) if value is None else value
            got = torch.zeros_like(leaf) if got is None else got
            _compare(f"the gradient of {name}", got, Expected(value, leaf.dtype), tolerance)


def _as_hinted(value: Any, hint: str) -> Any:
    """The number that an op makes of a tensor or array of one element where it wants none."""
    if "Tensor" in hint or "Any" in hint or value is None:
        return value
    if hasattr(value, "item"):
        value = value.item()
    for kind in (float, int, bool):
        if kind.__name__ in hint and isinstance(value, (bool, int, float)):
            return kind(value)
    return value


def judge(call: Call, with_gradients: bool) -> str:
    """Makes the call; "answer" or "error", as it was. Raises OpError."""
    fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(call.arguments))
    # The op may write to its arguments.
    before = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in call.arguments.items()
    }
    try:
        results = call.function(**call.arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        message = f"{type(error).__name__}: {str(error)[:500]}"
        if call.well_formed:
            raise OpError(f"refused: {message}") from error
        if fake:
            return "error"
        names = inspect.signature(call.function).parameters
        if not any(re.search(rf"\b{name}\b", str(error)) for name in names):
            raise OpError(f"an error that names no argument: {message}") from error
        return "error"
    except Exception as error:
        if isinstance(error, MemoryError) and not call.well_formed:
            return "error"
        raise OpError(f"raised {type(error).__name__}: {error}") from error
    if fake:
        return "answer"
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    hints = typing.get_type_hints(inspect.unwrap(call.function))
    doubles = {
        name: before[name].double().requires_grad_()
        if isinstance(value, Tensor) and value.requires_grad
        else _as_hinted(before[name], str(hints.get(name, "Tensor")))
        for name, value in call.arguments.items()
    }
    try:
        expected = list(call.reference(doubles, results))
    except Exception as error:
        raise OpError(f"taken, though the reference cannot: {error!r}") from error
    if len(results) != len(expected):
        raise OpError(f"{len(results)} results, expected {len(expected)}")
    tensors = [v for v in (*call.arguments.values(), *results) if isinstance(v, Tensor)]
    tolerance = max([TOLERANCE.get(t.dtype, 0.0) for t in tensors], default=0.0)
    for i, (got, right) in enumerate(zip(results, expected)):
        _compare(f"result {i}", got, right, tolerance)
    if with_gradients and call.well_formed:
        _check_gradients(call.arguments, doubles, results, expected, tolerance)
    return "answer"


# --- Running --------------------------------------------------------------------------------------


def _draw(module: str, seed: int, index: int) -> Call:
    torch.manual_seed(seed * 1_000_003 + index)
    return importlib.import_module(module).draw(random.Random(f"{seed} {index}"))


def run_calls(module: str, seed: int, calls: int, note: mmap.mmap | None = None) -> str:
    """Makes the calls; a line about them. Raises OpError, naming the call."""
    torch.set_num_threads(1)  # the tensors are tiny
    started = time.monotonic()
    counts = {"answer": 0, "error": 0}
    for index in range(calls):
        call = _draw(module, seed, index)
        if note is not None:
            note[:8] = index.to_bytes(8, "little")
        try:
            counts[judge(call, with_gradients=index % 2 == 0)] += 1
        except OpError as wrong:
            raise OpError(f"{module}, seed {seed}, call {index}: {call}: {wrong}") from wrong
    return (
        f"{module}, seed {seed}: {calls} calls, {counts['answer']} right answers, "
        f"{counts['error']} errors, {time.monotonic() - started:.0f} s"
    )


_START_SECONDS = 600  # a process has to start, at most; torch alone takes seconds to import


def run_in_process(module: str, seed: int, calls: int, timeout: float) -> str:
    """`run_calls` in a process of its own. Raises OpError for its death or delay, too.

    Args:
      timeout: seconds for the calls; what comes before the first is not counted.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        command = [sys.executable, "-m", "flashtrain.testing.fuzz", module, f"--seed={seed}"]
        command += [f"--calls={calls}", f"--note={file.name}", f"--timeout={timeout}"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            process = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout + _START_SECONDS,
                env=environment,
            )
        except subprocess.TimeoutExpired as late:
            raise OpError(f"{module}, seed {seed}: no end after {late.timeout} s") from late
        if process.returncode not in (0, 1):
            fate = f"the process ended with {_status(process.returncode)}: {process.stderr[-2000:]}"
            if process.returncode == -signal.SIGALRM:
                fate = f"still running after {timeout} s"
            file.seek(0)
            index = int.from_bytes(file.read(8), "little")
            call = _draw(module, seed, index)
            raise OpError(f"{module}, seed {seed}, call {index}: {call}: {fate}")
    if process.returncode == 1:
        raise OpError(process.stdout.strip() or process.stderr[-4000:])
    return process.stdout.strip()


def _status(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--note", help="a file for the number of the call that is being made")
    parser.add_argument("--timeout", type=float, default=0, help="end by SIGALRM after so long")
    flags = parser.parse_args()
    importlib.import_module(flags.module)
    signal.setitimer(signal.ITIMER_REAL, flags.timeout)
    note = None
    if flags.note:
        with open(flags.note, "r+b") as file:
            note = mmap.mmap(file.fileno(), 8)
    try:
        print(run_calls(flags.module, flags.seed, flags.calls, note))
    except OpError as wrong:
        print(wrong)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
