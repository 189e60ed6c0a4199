"""The types of arguments, as `checked` sees them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashtrain.ops._arguments import check_written, checked, dtype_names, overlap


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


@checked
def echo(
    scale: float = 1.0,
    flag: bool = False,
    window: tuple[int, int] | None = None,
    count: int | None = None,
    offsets: int | Tensor = 0,
) -> Any:
    return scale, flag, window, count, offsets


X = torch.ones(2)
ONE = torch.tensor(1)
untyped: Any = op
untyped_echo: Any = echo


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
        ({"scale": X}, TypeError, "scale: got Tensor; supported: float or int"),
        ({"scale": np.ones(1)}, TypeError, "scale: got ndarray; supported: float or int"),
        ({"scale": 1j}, TypeError, "scale: got complex; supported: float or int"),
        ({"scale": ONE.float().requires_grad_()}, ValueError, "scale: requires grad, and has no"),
        ({"scale": ONE.to("meta")}, ValueError, "scale: got a meta tensor, which has no value"),
        ({"flag": 2}, TypeError, "flag: got int; supported: bool"),
        ({"flag": "1"}, TypeError, "flag: got str; supported: bool"),
        ({"flag": X}, TypeError, "flag: got Tensor; supported: bool"),
        ({"window": 0}, TypeError, "window: got int; supported: tuple"),
        ({"window": ["0", "1"]}, TypeError, r"window\[0\]: got str; supported: int"),
        ({"window": (0, 0.5)}, TypeError, r"window\[1\]: got float; supported: int"),
        ({"window": [0, 1, 2]}, ValueError, "window: got 3 elements; supported: 2"),
        ({"window": [0, 2**63]}, ValueError, r"window\[1\]: got an integer of more than 64 bits"),
        ({"offsets": np.float64(1.5)}, TypeError, "offsets: got float64; supported: int or Tensor"),
        ({"offsets": np.uint64(2**63)}, ValueError, "offsets: got an integer of more than 64 bits"),
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


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"scale": np.float32(0.5)}, 0.5), ({"scale": torch.tensor([2])}, 2.0),
        ({"scale": np.array(0.25)}, 0.25), ({"scale": True}, 1.0),
        ({"scale": torch.ones((), dtype=torch.bfloat16)}, 1.0),
        ({"flag": 1}, True), ({"flag": 0.0}, False), ({"flag": None}, False),
        ({"flag": np.bool_(True)}, True), ({"flag": torch.tensor(True)}, True),
        ({"window": [1, 2]}, (1, 2)), ({"window": (np.int64(1), ONE)}, (1, 1)),
        ({"count": np.int32(3)}, 3), ({"count": torch.tensor([3])}, 3), ({"count": True}, 1),
        ({"count": np.float64(3.0)}, 3), ({"offsets": np.uint8(3)}, 3),
    ],
)  # fmt: skip
def test_what_is_converted(arguments: dict, result: Any) -> None:
    """Dao-AILab/flash-attention's callers: what torch's own custom ops convert."""
    (name,) = arguments
    place = list(inspect.signature(echo).parameters).index(name)
    defaults = [p.default for p in inspect.signature(echo).parameters.values()]
    for got in (echo(**arguments), untyped_echo(*defaults[:place], arguments[name])):
        assert got[place] == result
        assert type(got[place]) is type(result)
        assert all(type(n) is int for n in got[2] or ())
    assert echo(offsets=ONE)[4] is ONE


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
    assert torch.equal(compiled(X, 1), X * 2)
    with pytest.raises(TypeError, match="flag: got str; supported: bool"):
        module(X, "1")


# --- Tensors that are written to ------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.expand(4, 3, 5), lambda x: x[:, :1].expand(4, 3, 5),
        lambda x: x.as_strided((4, 3), (2, 1)), lambda x: x.flatten().unfold(0, 3, 2),
        lambda x: x.as_strided((2, 3), (1, 1)), lambda x: x[0, 0, 0].expand(2),
    ],
)  # fmt: skip
def test_memory_that_elements_share(make: Any) -> None:
    with pytest.raises(ValueError, match=r"out: got strides \[.*elements share memory"):
        check_written("out", make(torch.zeros(1, 3, 5)))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x, lambda x: x.transpose(0, 2), lambda x: x[:, ::2, 1:3], lambda x: x[:0],
        lambda x: x[:, :, :1].expand(4, 3, 1), lambda x: x[1:2, 1].expand(1, 5),
        lambda x: x.flatten().unfold(0, 3, 3), lambda x: x.permute(2, 0, 1)[:, :, 0],
        lambda x: x.new_zeros(()), lambda x: x[:1, :1, :1].expand(0, 3, 5),
    ],
)  # fmt: skip
def test_memory_of_their_own(make: Any) -> None:
    check_written("out", make(torch.zeros(4, 3, 5)))


def test_overlap() -> None:
    x = torch.zeros(12)
    assert overlap(x, x)
    assert overlap(x[:6], x[5:])
    assert overlap(x[:6].view(2, 3).t(), x[5:].view(torch.int32))
    assert not overlap(x[:6], x[6:])
    assert not overlap(x[:6].view(torch.int8), x[6:])
    assert not overlap(x[::2], x[1::2])
    assert not overlap(x, x.clone())
    assert not overlap(x[:0], x)


def test_names_of_dtypes_are_not_repeated() -> None:
    assert dtype_names(torch.float32, torch.bfloat16) == "torch.float32, torch.bfloat16"
    assert dtype_names(torch.float32, torch.float32) == "torch.float32"
