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
_LARGEST_INT = 2**63 - 1
_PLAIN = frozenset((bool, float, str, types.NoneType, torch.dtype))
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def dtype_names(*dtypes: torch.dtype) -> str:
    """For an error: each of them once."""
    return ", ".join(dict.fromkeys(map(str, dtypes)))


FLOAT_DTYPE_NAMES = dtype_names(*FLOAT_DTYPES)


def check_float(name: str, tensor: Tensor) -> None:
    """ValueError unless a tensor has a dtype of `FLOAT_DTYPES` and a device that ops run on."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: got dtype {tensor.dtype}; supported: {FLOAT_DTYPE_NAMES}")
    if not (tensor.is_cuda or tensor.is_cpu or tensor.is_meta):
        raise ValueError(f"{name}: is on {tensor.device}; supported: cpu, cuda")


# --- Tensors that are written to ------------------------------------------------------------------


def _extent(tensor: Tensor) -> int | None:
    """Elements from the first to the last in memory; None where two may have one address.

    They have not if no stride is shorter than all that it steps over.
    """
    if tensor.is_contiguous():
        return tensor.numel()
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride < extent:
                return None
            extent += (size - 1) * stride
    return extent


def check_written(name: str, tensor: Tensor) -> None:
    """ValueError unless each element of a tensor that is written to has an address of its own."""
    if torch.compiler.is_compiling():  # which cannot sort symbols
        shared = any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape))
    else:
        shared = _extent(tensor) is None
    if shared:
        raise ValueError(
            f"{name}: got strides {list(tensor.stride())} of shape {list(tensor.shape)}, so that "
            "elements share memory; supported where it is written to: an address for each, as of "
            f"{name}.contiguous()"
        )


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share memory; like torch, not for views that interleave in a storage."""
    if torch.compiler.is_compiling() or not torch._C._is_alias_of(one, other):
        return False
    ranges = []
    for tensor in (one, other):
        if _extent(tensor) != tensor.numel():
            return False
        size = tensor.element_size()
        begin = tensor.storage_offset() * size
        ranges.append((begin, begin + tensor.numel() * size))
    (begin, end), (other_begin, other_end) = ranges
    return begin < other_end and other_begin < end


# --- Types ----------------------------------------------------------------------------------------


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


def _elements(hint: Any) -> tuple[tuple[type, ...], ...]:
    """The classes of a tuple's elements, where a hint is or allows for tuple[A, B]."""
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) is tuple and ... not in typing.get_args(part):
            return tuple(map(_classes, typing.get_args(part)))
    return ()


def _text(classes: tuple[type, ...]) -> str:
    names = ["None" if c is types.NoneType else c.__name__ for c in classes]
    return " or ".join(dict.fromkeys(names))


def _number(name: str, value: Any) -> bool | int | float | None:
    """The number that a number of numpy's or a tensor of one element is; None: it is none."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires grad, and has no gradient here; supported: {name}.detach()"
            )
        if value.is_meta:
            raise ValueError(f"{name}: got a meta tensor, which has no value; supported: a number")
    elif isinstance(value, bool | int | float):
        return value
    elif getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return None
    number = value.item()
    return number if isinstance(number, (bool, int, float, *_SYMBOLS)) else None


def _converted(name: str, value: Any, classes: tuple[type, ...]) -> Any:
    """What torch's own custom ops make of a value of another class; TypeError where nothing."""
    if tuple in classes and isinstance(value, list):
        return tuple(value)
    if bool in classes and value is None:
        return False
    number = _number(name, value) if {int, bool}.intersection(classes) else None
    if isinstance(number, _SYMBOLS):
        return number
    if number is not None and float in classes:
        return float(number)
    if number is not None and int in classes and type(value) is not float and number % 1 == 0:
        return int(number)
    if number in (0, 1) and bool in classes:
        return bool(number)
    raise TypeError(f"{name}: got {type(value).__name__}; supported: {_text(classes)}")


def _checked_value(
    name: str, value: Any, classes: tuple[type, ...], elements: tuple[tuple[type, ...], ...]
) -> Any:
    """The value, or what it is converted to; without classes, any. TypeError or ValueError."""
    if not classes:
        return value
    if not isinstance(value, classes) or (isinstance(value, bool) and bool not in classes):
        value = _converted(name, value, classes)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise ValueError(f"{name}: got a {value.layout} tensor; supported: a dense one")
    elif isinstance(value, int):
        if not -_LARGEST_INT <= value <= _LARGEST_INT:
            raise ValueError(
                f"{name}: got an integer of more than 64 bits; supported: those of 64 bits"
            )
    elif elements and isinstance(value, tuple):
        if len(value) != len(elements):
            raise ValueError(f"{name}: got {len(value)} elements; supported: {len(elements)}")
        return tuple(
            _checked_value(f"{name}[{i}]", *element, ())
            for i, element in enumerate(zip(value, elements))
        )
    return value


def checked(function: Function) -> Function:
    """The function, after checks that its arguments are what its annotations say.

    Converts what torch's own custom ops convert: lists to tuples, numbers of numpy's and tensors of
    one element to numbers, 0, 1 and None to bool, bool to numbers. Tensors must be dense, integers
    fit 64 bits. TypeError or ValueError: the argument's name, what came, what is supported. Costs
    0.1 us an argument, 0.5 us for a tensor.
    """
    names = list(inspect.signature(function).parameters)
    checks: dict[str, tuple[Any, ...]] = {}  # the last arguments of _checked_value
    plain: dict[str, frozenset[type]] = {}  # of which every instance will do

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for i, (name, value) in enumerate(zip(names, args)):
            if type(value) not in plain[name]:
                result = _checked_value(name, value, *checks[name])
                if result is not value:
                    args = (*args[:i], result, *args[i + 1 :])
        for name, value in kwargs.items():
            if name in plain and type(value) not in plain[name]:
                kwargs[name] = _checked_value(name, value, *checks[name])
        return function(*args, **kwargs)

    hints = typing.get_type_hints(function)
    for name in names:
        hint = hints.get(name, Any)
        checks[name] = (_classes(hint), _elements(hint))
        plain[name] = _PLAIN.intersection(checks[name][0])
    return typing.cast(Function, call)
