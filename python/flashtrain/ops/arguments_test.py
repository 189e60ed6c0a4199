"""The types of arguments, as `checked` sees them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.ops._arguments import checked


@checked
def op(
    x: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    flag: bool = False,
    window: tuple[int, int] = (-1, -1),
    offsets: int | Tensor = 0,
    kind: str = "a",
    *,
    dtype: torch.dtype | None = None,
    anything: Any = None,
) -> Tensor:
    """Doubles x."""
    return x * 2


X = torch.ones(2)
untyped: Any = op


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"bias": X}, {"scale": 2}, {"flag": True}, {"window": (0, 1)}, {"offsets": 3},
        {"offsets": X}, {"kind": "b"}, {"dtype": torch.float32}, {"anything": object()},
        {"bias": torch.nn.Parameter(X)}, {"offsets": 2**63 - 1},
    ],
)  # fmt: skip
def test_what_is_taken(arguments: dict) -> None:
    assert torch.equal(op(X, **arguments), X * 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x: got NoneType; supported: Tensor$"),
        ({"bias": 1}, TypeError, "bias: got int; supported: Tensor or None"),
        ({"scale": "2"}, TypeError, "scale: got str; supported: float or int"),
        ({"scale": True}, TypeError, "scale: got bool; supported: float or int"),
        ({"flag": 1}, TypeError, "flag: got int; supported: bool"),
        ({"flag": X}, TypeError, "flag: got Tensor; supported: bool"),
        ({"window": [0, 1]}, TypeError, "window: got list; supported: tuple"),
        ({"offsets": 1.5}, TypeError, "offsets: got float; supported: int or Tensor"),
        ({"dtype": "float32"}, TypeError, "dtype: got str; supported: dtype or None"),
        ({"x": X.to_sparse()}, ValueError, "x: got a torch.sparse_coo tensor; supported: a dense"),
        ({"offsets": 2**63}, ValueError, "offsets: got an integer of more than 64 bits"),
        ({"scale": 10**400}, ValueError, "scale: got an integer of more than 64 bits"),
    ],
)
def test_what_is_refused(arguments: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": X} | arguments
    with pytest.raises(error, match=message):
        op(**arguments)
    if "dtype" not in arguments:
        bound = inspect.signature(op).bind(**arguments)
        bound.apply_defaults()
        with pytest.raises(error, match=message):
            op(*bound.args)


def test_what_the_function_says_itself() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        untyped(X, y=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        untyped()
    assert op.__doc__ == "Doubles x."
    assert list(inspect.signature(op).parameters)[:2] == ["x", "bias"]


def test_methods_and_compile() -> None:
    class Module(torch.nn.Module):
        @checked
        def forward(self, x: Tensor, flag: bool = False) -> Tensor:
            return op(x, flag=flag)

    module = Module()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X, flag=True), X * 2)
    with pytest.raises(TypeError, match="flag: got int; supported: bool"):
        module(X, 1)
