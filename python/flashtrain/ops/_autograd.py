"""autograd.Function for all ops: as fast as torch's in eager calls, and fit for torch.func."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

_SECOND = "got a second derivative of an op of flashtrain; supported: the first"


class Function(torch.autograd.Function):
    """An autograd.Function with the usual forward(ctx, ...), which torch.func transforms as well.

    torch.func.grad, vjp, jacrev and vmap ask for a forward without ctx and for `setup_context`,
    with which torch 2.13 binds the arguments of every eager call by their names, 30 us. So a
    function of that form stands in only where a transform is active.

    forward must return a tensor or a tuple of tensors and None; all else that backward needs goes
    through save_for_backward and attributes of ctx. What it finds in needs_input_grad may be more
    than what backward finds there.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        call = _Call(cls)
        return call.outputs(_Transformed.apply(call, *args))


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward(ctx, ...) whose results, where they are differentiated again, raise.

    torch's own marks them only where a gradient that comes in has a graph: that of a plain sum has
    none, and a penalty on gradients would silently count for nothing.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled() or isinstance(ctx, _Call) or torch.compiler.is_compiling():
            return gradients
        refusing = torch._C._functions.DelayedError(_SECOND.encode(), len(gradients))
        marked = (None if g is None else g.detach().requires_grad_() for g in gradients)
        return refusing(*marked)

    return call


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether one of them may have a gradient; where torch.func maps, nothing else shows it."""
    return torch.is_grad_enabled() and (
        torch._C._are_functorch_transforms_active()
        or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    )


def may_overwrite_saved(ctx: Any) -> bool:
    """Whether backward may write to what forward saved for it.

    A compiled graph cannot; what torch.func.vjp returns may be called again.
    """
    return not isinstance(ctx, _Call) and not torch.compiler.is_compiling()


class _Call:
    """The ctx of one call: what forward leaves on it, but for tensors, which transforms wrap."""

    def __init__(self, function: type[Function]) -> None:
        self._function = function
        self._saved: tuple[Tensor | None, ...] = ()
        self._non_differentiable: tuple[Tensor, ...] = ()
        self._dirty: tuple[Tensor, ...] = ()
        self._materialize_grads = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._saved = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._non_differentiable = tensors

    def mark_dirty(self, *tensors: Tensor) -> None:
        self._dirty = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self._materialize_grads = value

    def run(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Forward: its outputs and whatever else it saves, each tensor once.

        What was a tensor on this object becomes its place among arguments and results.
        """
        self.needs_input_grad = tuple(
            isinstance(arg, Tensor) and arg.is_floating_point() for arg in args
        )
        outputs = self._function.forward(self, *args)
        self._is_tuple = isinstance(outputs, tuple)
        outputs = outputs if self._is_tuple else (outputs,)
        self._is_output = [output is not None for output in outputs]
        results = [output for output in outputs if output is not None]
        self._likes = [(output.shape, output.dtype, output.device) for output in results]

        def place(tensor: Tensor | None, tensors: list[Any]) -> int | None:
            places = [i for i, other in enumerate(tensors) if other is tensor]
            return places[0] if tensor is not None and places else None

        self._saved_inputs = [place(tensor, list(args)) for tensor in self._saved]
        for tensor, of_input in zip(self._saved, self._saved_inputs):
            if tensor is not None and of_input is None and place(tensor, results) is None:
                results.append(tensor)
        self._saved_results = [place(tensor, results) for tensor in self._saved]
        self._dirty_inputs = [place(tensor, list(args)) for tensor in self._dirty]
        self._constant_results = [place(tensor, results) for tensor in self._non_differentiable]
        self._saved = self._non_differentiable = self._dirty = ()
        return tuple(results)

    def set_up(self, ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        saved = [
            args[i] if i is not None else None if j is None else results[j]
            for i, j in zip(self._saved_inputs, self._saved_results)
        ]
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*(results[i] for i in self._constant_results if i is not None))
        if self._dirty_inputs:
            ctx.mark_dirty(*(args[i] for i in self._dirty_inputs if i is not None))
        ctx.set_materialize_grads(False)
        ctx.call = self

    def outputs(self, results: tuple[Tensor, ...]) -> Any:
        """Forward's own outputs among the results."""
        left = iter(results)
        outputs = tuple(next(left) if present else None for present in self._is_output)
        return outputs if self._is_tuple else outputs[0]

    def backward(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        num_outputs = len(self._likes)
        if any(grad is not None for grad in grads[num_outputs:]):
            self.refuse()  # a gradient of what backward read
        tensors = (*ctx.saved_tensors, *grads[:num_outputs])
        wanted = ctx.needs_input_grad[1:]
        gradients = iter(_Gradients.apply(self, len(ctx.saved_tensors), wanted, *tensors))
        return tuple(next(gradients) if want else None for want in wanted)

    def refuse(self) -> NoReturn:
        raise RuntimeError(_SECOND)

    def gradients(
        self, num_saved: int, wanted: tuple[bool, ...], tensors: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, ...]:
        """Those of the wanted arguments."""
        context: Any = copy.copy(self)
        context.saved_tensors, context.needs_input_grad = tensors[:num_saved], wanted
        left = iter(
            torch.zeros(shape, dtype=dtype, device=device)
            if grad is None and self._materialize_grads
            else grad
            for grad, (shape, dtype, device) in zip(tensors[num_saved:], self._likes)
        )
        of_outputs = [next(left) if present else None for present in self._is_output]
        gradients = self._function.backward(context, *of_outputs)
        return tuple(gradient for gradient, want in zip(gradients, wanted) if want)


class _Transformed(torch.autograd.Function):
    """Any Function, whose _Call is the first argument, in the form that transforms ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *args: Any) -> tuple[Tensor, ...]:
        return call.run(args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *args = inputs
        call.set_up(ctx, tuple(args), output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, *ctx.call.backward(ctx, grads)


class _Gradients(torch.autograd.Function):
    """The backward pass of a _Transformed: differentiated again, it raises, and gives no zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, num_saved: int, wanted: tuple[bool, ...], *tensors: Tensor | None):
        return call.gradients(num_saved, wanted, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(_SECOND)
