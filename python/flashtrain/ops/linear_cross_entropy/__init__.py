"""The loss of a language model's head: cross entropy of hidden @ weight.T + bias, in chunks.

The logits of all rows, often the largest tensor of a training step, never exist: a chunk of rows at
a time is multiplied, turned into losses and into its own gradient, and multiplied again, all in the
forward pass; backward only scales. The matrix products are torch's (cuBLAS, oneDNN), the cross
entropy is the kernel of `flashtrain.ops.cross_entropy`. docs/linear_cross_entropy.md has
numerics, cost and errors.

Dtypes: hidden float32, float16 or bfloat16, weight and bias float32 or hidden's (and converted to
hidden's for the products); labels int64 or int32. The gradient of weight is summed in float32.
Under `torch.autocast` hidden is converted to its dtype.

D is the hidden size, V the number of classes.

    linear_cross_entropy_forward           losses, z_losses
    linear_cross_entropy_forward_backward  losses, z_losses, dhidden, dweight, dbias, where dloss is
                                           the gradient of each row's loss
    scale_into                             out = factor * x, where out may be x

A chunk's product makes its logits, one kernel turns them into their own gradient, and two more
products make of it the chunk's dhidden and its part of dweight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._arguments import checked
from flashtrain.ops._autograd import (
    Function,
    may_overwrite_saved,
    needs_autograd,
    once_differentiable,
)
from flashtrain.ops._library import launch_context, register, to_kernel
from flashtrain.ops.cross_entropy import (
    check_labels_fit,
    check_matrix,
    check_options,
    check_reduction,
    num_classes_of,
    reduce_losses,
)
from flashtrain.ops.cross_entropy.kernels import (
    Options,
    check_labels,
    is_counted,
    run_forward_backward,
)

# Of a chunk's logits and dweight, float32, together, and of the logits at least. On an H100 the
# weight's product of 4,096 rows is 10 to 20% faster than that of 2,048, which reads and writes
# dweight twice as often; of 8,192 rows 3% more.
_BUFFER_BYTES = 600 * 2**20
_LEAST_CHUNK_BYTES = 200 * 2**20
_CHUNK_ROWS_MULTIPLE = 128  # a matrix product's tile


def chunk_rows(rows: int, columns: int, features: int, itemsize: int) -> int:
    """Rows of a chunk: as many as fit, at least a tile, and about the same for all chunks."""
    chunk_bytes = max(_BUFFER_BYTES - 4 * columns * features, _LEAST_CHUNK_BYTES)
    tiles = max(chunk_bytes // (columns * itemsize * _CHUNK_ROWS_MULTIPLE), 1)
    chunks = -(-rows // (tiles * _CHUNK_ROWS_MULTIPLE))
    if chunks <= 1:
        return max(rows, 1)
    return -(-rows // (chunks * _CHUNK_ROWS_MULTIPLE)) * _CHUNK_ROWS_MULTIPLE


# --- Kernels and fakes ----------------------------------------------------------------------------


def _logits_of_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each chunk's rows, hidden states [rows, D] and logits [rows, V]; the latter share memory."""
    rows, (columns, features) = hidden.shape[0], weight.shape
    size = chunk_rows(rows, columns, features, hidden.element_size())
    buffer = hidden.new_empty((min(size, rows), columns))
    for begin in range(0, rows, size):
        chunk = slice(begin, min(begin + size, rows))
        hidden_chunk = hidden[chunk]
        logits = buffer[: len(hidden_chunk)]
        if bias is None:
            torch.mm(hidden_chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden_chunk, weight.t(), out=logits)
        yield chunk, hidden_chunk, logits


def _prepare(hidden, weight, bias, labels, options: Options):
    """The matrices and vectors that the chunks are cut from, in the dtype of hidden."""
    check_labels(labels, options.ignore_index, options.num_classes)
    bias = None if bias is None else bias.to(hidden.dtype)
    return (
        hidden.reshape(-1, hidden.shape[-1]),
        weight.to(hidden.dtype),
        bias,
        labels.reshape(-1),
    )


def _loss_outputs(hidden: Tensor) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
    return losses, torch.empty_like(losses)


def _forward_kernel(hidden, weight, bias, labels, *options):
    options = Options(*options)
    losses, z_losses = _loss_outputs(hidden)
    losses_N, z_losses_N = losses.view(-1), z_losses.view(-1)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight, bias, labels = _prepare(hidden, weight, bias, labels, options)
        for chunk, _, logits in _logits_of_chunks(hidden, weight, bias):
            _kernels.cross_entropy_forward(
                to_kernel(logits),
                to_kernel(labels[chunk]),
                None,
                *options,
                False,
                to_kernel(losses_N[chunk]),
                None,
                to_kernel(z_losses_N[chunk]),
                launch_context(logits),
            )
    return losses, z_losses


def _forward_fake(hidden, *args):
    return _loss_outputs(hidden)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b, or total += a @ b; total is float32, a and b of any one dtype."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif not total.is_cuda:  # no product of float16 or bfloat16 matrices in float32 there
        total.copy_(torch.mm(a, b)) if first else total.add_(torch.mm(a, b))
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _gradients(hidden: Tensor, weight: Tensor, output_mask: list[bool]) -> list[Tensor]:
    """dhidden, dweight, dbias; the latter two float32. One that is not wanted has 0 elements."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, torch.float32, torch.float32)
    return [
        hidden.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, output_mask)
    ]


def _forward_backward_kernel(hidden, weight, bias, labels, dloss, *args):
    options, output_mask = Options(*args[:-1]), args[-1]
    losses, z_losses = _loss_outputs(hidden)
    losses_N, z_losses_N = losses.view(-1), z_losses.view(-1)
    gradients = _gradients(hidden, weight, output_mask)
    dhidden, dweight, dbias = gradients
    need_hidden, need_weight, need_bias = output_mask
    dhidden_ND = dhidden.view(-1, hidden.shape[-1]) if need_hidden else dhidden
    if losses.numel() == 0:
        dweight.zero_()
    dbias.zero_()
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight, bias, labels = _prepare(hidden, weight, bias, labels, options)
        for chunk, hidden_chunk, logits in _logits_of_chunks(hidden, weight, bias):
            dlosses = dloss.expand(len(logits))
            run_forward_backward(
                logits, labels[chunk], dlosses, options, losses_N[chunk], z_losses_N[chunk]
            )
            if need_hidden:
                torch.mm(logits, weight, out=dhidden_ND[chunk])
            if need_weight:
                _add_product(dweight, logits.t(), hidden_chunk, first=chunk.start == 0)
            if need_bias:
                dbias += logits.sum(0, dtype=torch.float32)
    return losses, z_losses, *gradients


def _forward_backward_fake(hidden, weight, bias, labels, dloss, *args):
    return *_loss_outputs(hidden), *_gradients(hidden, weight, args[-1])


def _scale_into_kernel(x: Tensor, factor: Tensor, out: Tensor) -> None:
    _kernels.scale(to_kernel(x), to_kernel(factor), to_kernel(out), launch_context(x))


# --- Schemas --------------------------------------------------------------------------------------

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_OPTIONS = (
    "float label_smoothing, float logit_scale, float lse_square_scale, SymInt ignore_index, "
    "SymInt first_class, SymInt num_classes"
)

linear_cross_entropy_forward = register(
    f"linear_cross_entropy_forward({_TENSORS}, {_OPTIONS}) -> (Tensor losses, Tensor z_losses)",
    _forward_kernel,
    _forward_fake,
)
linear_cross_entropy_forward_backward = register(
    f"linear_cross_entropy_forward_backward({_TENSORS}, Tensor dloss, {_OPTIONS}, "
    "bool[3] output_mask) "
    "-> (Tensor losses, Tensor z_losses, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _forward_backward_kernel,
    _forward_backward_fake,
)
scale_into = register(
    "scale_into(Tensor x, Tensor factor, Tensor(a!) out) -> ()",
    _scale_into_kernel,
    lambda *args: None,
)


# --- Autograd -------------------------------------------------------------------------------------


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, may_overwrite: bool) -> Tensor:
    """factor * gradient in `dtype`: in place if it is the gradient's and may be overwritten.

    torch.mul(gradient, factor, out=<of another dtype>) moves half as many bytes a second.
    """
    if not may_overwrite:
        return (gradient * factor).to(dtype)
    in_place = gradient.dtype == dtype
    result = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    scale_into(gradient, factor, result)
    if in_place:
        torch.autograd.graph.increment_version(result)  # a second backward is refused
    return result


class _LinearCrossEntropy(Function):
    """(sum of losses, sum of z_losses), both divided by `count`, float32 [].

    The gradients are computed in forward, of the sum of losses times 2**e / count, a factor of 1
    to 2. Backward scales them in place, by 2**-e and the loss's own gradient: without a further
    rounding where that is a power of two, and gradients of float16 do not vanish for a large count.

    Saves the gradients.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, count, options):
        mantissa, exponent = torch.frexp(count)
        output_mask = list(ctx.needs_input_grad[:3])
        losses, z_losses, *gradients = linear_cross_entropy_forward_backward(
            hidden, weight, bias, labels, 1.0 / mantissa, *options, output_mask
        )
        rest = torch.ldexp(torch.ones_like(count), -exponent)
        ctx.save_for_backward(*gradients, rest)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        z_loss = z_losses.sum() / count
        ctx.mark_non_differentiable(z_loss)
        return losses.sum() / count, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _):
        *gradients, rest = ctx.saved_tensors
        factor, may_overwrite = dloss * rest, may_overwrite_saved(ctx)
        scaled = (
            _scaled(gradient, factor, dtype, may_overwrite) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.needs_input_grad)
        )
        return *scaled, None, None, None


# --- Public function ------------------------------------------------------------------------------


def _check_parameter(name: str, tensor: Tensor, fits: bool, shape: str, hidden: Tensor) -> None:
    if not fits:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}; supported: {shape}, to fit hidden "
            f"{list(hidden.shape)}"
        )
    if tensor.dtype != hidden.dtype and tensor.dtype != torch.float32:
        raise ValueError(
            f"{name}: got dtype {tensor.dtype}; supported: torch.float32 or hidden's, "
            f"{hidden.dtype}"
        )
    if tensor.device != hidden.device:
        raise ValueError(f"{name}: is on {tensor.device}; supported: hidden's, {hidden.device}")


@checked
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    return_z_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The cross entropy of logits = hidden @ weight.T + bias, in nats, without the logits.

    Args:
      hidden: [..., D], float32, float16 or bfloat16.
      weight: [V, D], float32 or hidden's dtype.
      labels: [...], int64 or int32, in [0, V) or ignore_index.
      bias: [V], float32 or hidden's dtype; None: no bias.
      label_smoothing, logit_scale, lse_square_scale, ignore_index: as for
        `flashtrain.ops.cross_entropy.cross_entropy_loss`.
      reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", or "none",
        which has no gradient: for evaluation.
      vocab_size: rows of weight from here on are padding: in no sum, gradient 0.
      return_z_loss: return (loss, z_loss), the latter without gradient, rather than loss.

    Returns the loss, float32 [] or, for "none", [...].

    Saved for backward: the gradients of hidden (in its dtype), weight and bias (float32), where
    they are required; not hidden, nor weight. Backward scales them in place, so a second backward
    is refused. Memory beside them: the logits of a chunk, which take 600 MiB together with
    weight's gradient in float32, but at least 200 MiB or 128 rows.

    Raises:
      ValueError: an argument does not fit, or "none" is to have a gradient; labels as for
        `cross_entropy_loss`.
      RuntimeError: the device reported an error.
    """
    check_matrix("hidden", hidden)
    check_labels_fit(labels, hidden)
    check_options(label_smoothing, logit_scale, lse_square_scale)
    check_reduction(reduction)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[-1] and weight.shape[0] > 0
    _check_parameter("weight", weight, fits, f"[V, {hidden.shape[-1]}]", hidden)
    if bias is not None:
        fits = bias.shape == weight.shape[:1]
        _check_parameter("bias", bias, fits, f"[{weight.shape[0]}]", hidden)
    options = Options(
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        0,
        num_classes_of(vocab_size, weight.shape[0]),
    )
    inputs = (hidden, weight, bias)
    if needs_autograd(*inputs):
        if reduction == "none":
            raise ValueError(
                "reduction: got 'none' and an input that requires grad; supported: 'mean' or "
                "'sum', torch.no_grad(), or flashtrain.ops.cross_entropy on the logits"
            )
        count = torch.ones((), dtype=torch.float32, device=hidden.device)
        if reduction == "mean":
            count = is_counted(labels, ignore_index).sum().clamp(min=1).float()
        loss, z_loss = _LinearCrossEntropy.apply(hidden, weight, bias, labels, count, options)
    else:
        losses, z_losses = linear_cross_entropy_forward(hidden, weight, bias, labels, *options)
        loss, z_loss = (
            reduce_losses(values, labels, ignore_index, reduction) for values in (losses, z_losses)
        )
    return (loss, z_loss) if return_z_loss else loss
