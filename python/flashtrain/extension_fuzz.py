"""Random calls of the extension's functions; see flashtrain.testing.fuzz.

Callers other than flashtrain.ops may pass anything: an error that names an argument, or the right
answer, never a crash. Some calls come after one that found no memory.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import random
import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.extension_fuzz_calls import GROUPS, WRAPPERS, UncheckedError
from flashtrain.testing.fuzz import Call, Expected, overlapping, spoil, tensor


@contextlib.contextmanager
def limited_memory(spare: int) -> Iterator[None]:
    """The process gets no more than `spare` further bytes of addresses."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# Columns. A row's scratch is 192 MiB, more than malloc keeps of what was freed.
_WIDE = 2**24


@functools.cache
def _wide_row() -> Tensor:
    return torch.zeros(1, _WIDE)


def run_out_of_memory() -> None:
    """A call whose scratch memory is refused; raises AssertionError if it is not."""
    x = _wide_row()
    with limited_memory(2**23):
        try:
            _kernels.layer_norm_forward(
                x, None, None, None, None, None, None, 0.0, 1e-5, False, False, x, None, None,
                None, None, 0,
            )  # fmt: skip
        except MemoryError:
            return
    raise AssertionError("the call found memory")


def _spoil(rng: random.Random, name: str, value: Any, is_output: bool) -> Any:
    if name == "allocate":  # what a function of the caller raises is the caller's
        return rng.choice((None, 1, "allocate"))
    if not isinstance(value, Tensor) or rng.random() < 0.6:
        return spoil(rng, value)
    if is_output or rng.random() < 0.5:
        return overlapping(rng, value)
    if value.is_floating_point():
        return tensor(rng, value.shape, value.dtype)
    return value + rng.choice((-1, 1, 2**31, 2**40, -(2**40)))  # as the dtype holds it


def _converted(value: Any, number: type | None) -> Any:
    """The argument as the extension reads it."""
    if number is not None:
        return operator.index(value) if number is int else float(value)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def draw(rng: random.Random) -> Call:
    name, arguments, outputs, reference = GROUPS[rng.choice(sorted(GROUPS))](rng)
    wrapped: Callable[..., Any] = WRAPPERS.get(name) or getattr(_kernels, name)
    numbers = {n: type(value) for n, value in arguments.items() if type(value) in (int, float)}
    starved = rng.random() < 0.02
    well_formed = name not in ("set_num_threads", "adamw_table_bytes") and reference is not None
    well_formed = well_formed and not name.startswith("dense_matmul") and rng.random() < 0.4
    if not well_formed:
        for each in rng.sample(sorted(arguments), min(len(arguments), rng.choice((1, 1, 2)))):
            arguments[each] = _spoil(rng, each, arguments[each], each in outputs)

    def function(**given: Any) -> list[Any]:
        if starved:
            run_out_of_memory()
        wrapped(**given)
        return [_converted(given[output], None) for output in outputs]

    function.__name__ = name
    kind = inspect.Parameter.KEYWORD_ONLY
    # An error may use the name of a list, or that of the C++ API.
    names = dict.fromkeys((*arguments, "params", "cols", "known_lse"))
    parameters = [inspect.Parameter(each, kind) for each in names]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    def expected(a: dict[str, Any], results: list[Any]) -> list[Expected | None]:
        floats = [value for value in a.values() if isinstance(value, float)]
        # What a backward reads must belong together; else only a crash is wrong.
        unrelated = not well_formed and name.endswith("backward")
        absurd = unrelated or any(not -1e6 < number < 1e6 for number in floats)
        try:
            values = reference({n: _converted(v, numbers.get(n)) for n, v in a.items()})
        except UncheckedError:
            values, absurd = (
                [result if result is None else result.detach() for result in results],
                True,
            )
        return [
            result
            if result is None
            else Expected(value.to("meta") if absurd else value, result.dtype)
            for value, result in zip(values, results)
        ]

    return Call(function, arguments, expected, well_formed)
