"""What the registration and the calls of every op share: torch.library, DLPack, stream, threads."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from flashtrain import _kernels

_LIBRARY = torch.library.Library("flashtrain", "FRAGMENT")


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Defines the op flashtrain::<schema>, with one kernel for CPU and CUDA, and returns it.

    The op has no autograd formula: an autograd.Function calls it. Costs of a no-op on six
    arguments, torch 2.13: this 2 us, `custom_op` 18 us; with autograd around it,
    autograd.Function 8 us more, `register_autograd` 23 us more.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for dispatch_key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, dispatch_key)
    op: torch._ops.OpOverload = getattr(torch.ops.flashtrain, name).default

    @functools.wraps(fake)
    def traced(*args: Any, **kwargs: Any) -> Any:
        _tell_inductor(op)
        return fake(*args, **kwargs)

    torch.library.register_fake(f"flashtrain::{name}", traced, lib=_LIBRARY)
    return op


def _tell_inductor(op: torch._ops.OpOverload) -> None:
    """That `op` is called as it is, before it finds so itself and registers the same.

    Before it does, torch 2.11 writes out for a log what all arguments are computed from, each as
    often as there are ways to it: with a GPT of 12 blocks it never ends. The fakes of a graph run
    before the graph is lowered.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if torch.__version__ >= (2, 13) or lowering is None or op in lowering.lowerings:
        return
    tag = lowering.get_layout_constraint_tag(op, with_default=True)
    lowering.make_fallback(op, lowering.tag_to_layout_constraint(tag), warn=False)


# Arguments of which nothing but the op itself makes anything; a FakeTensor or DTensor is none.
_PLAIN_TYPES = frozenset(
    (Tensor, torch.nn.Parameter, torch.dtype, bool, int, float, list, type(None))
)


def eager(op: torch._ops.OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel itself where nothing could tell, the op elsewhere.

    A call of the op costs 7 to 30 us more, by machine: the dispatcher boxes the arguments and goes
    to Python twice. Compilers, dispatch modes (fake tensors, FLOP counters), tensor subclasses,
    torch.func's transforms, meta tensors and the profiler need to see the op. The kernel's first
    argument is a tensor.
    """

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch._C._autograd._profiler_enabled()
            or not _PLAIN_TYPES.issuperset(map(type, args))
            or args[0].is_meta
        ):
            return op(*args)
        try:
            return kernel(*args)
        except ValueError:
            # The extension refuses views with a negative bit, which the dispatcher resolves.
            if any(isinstance(arg, Tensor) and arg.is_neg() for arg in args):
                return op(*args)
            raise

    return call


if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):

    def to_kernel(tensor: Tensor | None) -> object:
        """The tensor as an argument of a kernel: as it is, read through DLPack's C interface."""
        return tensor
else:

    def to_kernel(tensor: Tensor | None) -> object:
        """The tensor as an argument of a kernel: a DLPack capsule, 0.2 us.

        Not `Tensor.__dlpack__`, which refuses tensors that require grad and synchronises streams.
        """
        if tensor is not None and tensor.is_neg():  # a capsule does not say so
            raise ValueError("got a view with a negative bit; supported: its resolve_neg()")
        return None if tensor is None else torch.utils.dlpack.to_dlpack(tensor)


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor [..., D] if kernels can read it as rows, else a contiguous copy.

    They can if the elements of a row are adjacent, one stride leads from row to row through all
    leading dimensions, and rows do not overlap.
    """
    if tensor.is_contiguous():
        return tensor
    row_stride, rows = 0, 1
    for size, stride in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1]):
        if size > 1:
            if rows == 1:
                row_stride = stride
            elif stride != row_stride * rows:
                return tensor.contiguous()
            rows *= size
    cols = tensor.shape[-1]
    if (cols > 1 and tensor.stride(-1) != 1) or (rows > 1 and row_stride < cols):
        return tensor.contiguous()
    return tensor


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """For what is made in a call and kept: ordinary tensors, whatever mode the caller is in.

    A tensor made under inference mode has no gradients later, one made under a FakeTensorMode no
    memory.
    """
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        yield


def launch_context(tensor: Tensor) -> int:
    """The stream for a kernel on the tensor's device; on CPU, 0, after setting the thread count."""
    if tensor.is_cuda:
        # torch.cuda.current_stream(device).cuda_stream without making a Stream: 0.1 us, not 1.5.
        return torch._C._cuda_getCurrentRawStream(tensor.get_device())
    _kernels.set_num_threads(torch.get_num_threads())
    return 0
