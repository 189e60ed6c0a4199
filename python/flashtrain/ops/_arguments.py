"""Checks of arguments, and their errors, that all ops share."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_DTYPE_NAMES = ", ".join(map(str, FLOAT_DTYPES))
_LARGEST_INT = 2**63 - 1
_PLAIN = frozenset((bool, float, str, tuple, types.NoneType, torch.dtype))


def check_float(name: str, tensor: Tensor) -> None:
    """ValueError unless a tensor has a dtype of `FLOAT_DTYPES` and a device that ops run on."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: got dtype {tensor.dtype}; supported: {FLOAT_DTYPE_NAMES}")
    if not (tensor.is_cuda or tensor.is_cpu or tensor.is_meta):
        raise ValueError(f"{name}: is on {tensor.device}; supported: cpu, cuda")


def _classes(hint: Any) -> tuple[type, ...]:
    """What isinstance takes for a hint; a float may be an int; () where it is not known."""
    if hint is Any:
        return ()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_classes(part) for part in typing.get_args(hint)]
        return sum(parts, ()) if all(parts) else ()
    origin = typing.get_origin(hint) or hint
    if origin is float:
        return (float, int)
    return (origin,) if isinstance(origin, type) else ()


def _text(classes: tuple[type, ...]) -> str:
    names = ["None" if c is types.NoneType else c.__name__ for c in classes]
    return " or ".join(dict.fromkeys(names))


def _refuse(name: str, value: object, classes: tuple[type, ...]) -> None:
    if not isinstance(value, classes) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; supported: {_text(classes)}")
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: got a {value.layout} tensor; supported: a dense one")
    raise ValueError(f"{name}: got an integer of more than 64 bits; supported: those of 64 bits")


def checked(function: Function) -> Function:
    """The function, after checks that its arguments are what its annotations say.

    Tensors must be dense, integers fit 64 bits, and a bool is not a number. TypeError or
    ValueError: the argument's name, what came, what is supported. Costs 0.1 us an argument, 0.5 us
    for a tensor.
    """
    names = list(inspect.signature(function).parameters)
    classes: dict[str, tuple[type, ...]] = {}
    plain: dict[str, frozenset[type]] = {}  # of which every instance will do

    def check(name: str, value: object) -> None:
        supported = classes.get(name)
        if supported and (
            not isinstance(value, supported)
            or (isinstance(value, bool) and bool not in supported)
            or (isinstance(value, Tensor) and value.layout is not torch.strided)
            or (isinstance(value, int) and not -_LARGEST_INT <= value <= _LARGEST_INT)
        ):
            _refuse(name, value, supported)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, value in zip(names, args):
            if type(value) not in plain[name]:
                check(name, value)
        for name, value in kwargs.items():
            if name in plain and type(value) not in plain[name]:
                check(name, value)
        return function(*args, **kwargs)

    hints = typing.get_type_hints(function)
    classes.update((name, _classes(hint)) for name, hint in hints.items())
    for name in names:
        plain[name] = _PLAIN.intersection(classes.get(name, ()))
    return typing.cast(Function, call)
