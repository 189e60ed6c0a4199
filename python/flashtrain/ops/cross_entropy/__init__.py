"""Fused cross entropy of logits and integer labels, forward and backward, on CPU and CUDA.

    x      = logit_scale * logits
    lse    = log(sum(exp(x)))
    z_loss = lse_square_scale * lse^2
    loss   = lse - (1 - label_smoothing) * x[label] - label_smoothing * mean(x) + z_loss

over the last dimension, the V classes. The public function and module have flash-attn's names and
arguments (`flash_attn.ops.triton.cross_entropy`, `flash_attn.losses.cross_entropy`).
docs/cross_entropy.md describes numerics, cost and errors.

Dtypes: logits float32, float16 or bfloat16; labels int64 or int32; losses float32. All arithmetic
is float32, so `logits.float()` before the call only costs memory. `torch.autocast` changes nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashtrain.ops._arguments import check_float, check_written, checked
from flashtrain.ops._autograd import Function, may_overwrite_saved, once_differentiable
from flashtrain.ops.cross_entropy import kernels
from flashtrain.ops.cross_entropy.kernels import Options

_LABEL_DTYPES = (torch.int64, torch.int32)
REDUCTIONS = ("mean", "sum", "none")


# --- Checks ---------------------------------------------------------------------------------------


def check_options(label_smoothing: float, logit_scale: float, lse_square_scale: float) -> None:
    for name, value, fits, supported in (
        ("label_smoothing", label_smoothing, 0.0 <= label_smoothing <= 1.0, "0 to 1"),
        ("logit_scale", logit_scale, 0.0 < logit_scale < float("inf"), "more than 0, finite"),
        ("lse_square_scale", lse_square_scale, 0.0 <= lse_square_scale < float("inf"),
         "at least 0, finite"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{name}: got {value}; supported: {supported}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; supported: {', '.join(REDUCTIONS)}")


def check_matrix(name: str, tensor: Tensor) -> None:
    """A matrix of floating-point numbers on a supported device."""
    check_float(name, tensor)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}; supported: at least one dimension, and the "
            "last at least 1"
        )


def check_rows(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], to: Tensor) -> None:
    """`tensor` has one element for each row of `to`."""
    if tensor.shape != to.shape[:-1]:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}; supported: {list(to.shape[:-1])}, one for "
            f"each row of {list(to.shape)}"
        )
    if tensor.dtype not in dtypes:
        supported = ", ".join(map(str, dtypes))
        raise ValueError(f"{name}: got dtype {tensor.dtype}; supported: {supported}")
    if tensor.device != to.device:
        raise ValueError(f"{name}: is on {tensor.device}; supported: {to.device}, as the rows")


def check_labels_fit(labels: Tensor, to: Tensor) -> None:
    check_rows("labels", labels, _LABEL_DTYPES, to)


def num_classes_of(vocab_size: int | None, columns: int) -> int:
    """vocab_size, or all columns; the others are padding."""
    if vocab_size is None:
        return columns
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size: got {vocab_size}; supported: 1 to {columns}, the number of columns"
        )
    return vocab_size


# --- Autograd -------------------------------------------------------------------------------------


def _combine(
    losses: Tensor, lse: Tensor, labels: Tensor, options: Options, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """losses, lse and z_losses over the classes of all processes, from each one's partial ones."""
    mine = torch.stack([losses, lse])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    all_losses, all_lse = torch.stack(gathered, 1)
    ignored = ~kernels.is_counted(labels, options.ignore_index)
    lse = torch.logsumexp(all_lse, 0).masked_fill_(ignored, 0.0)
    z_losses = options.lse_square_scale * lse.square()
    return all_losses.sum(0) + lse + z_losses, lse, z_losses


class _CrossEntropy(Function):
    """(losses, z_losses). Saves logits, labels and lse."""

    @staticmethod
    def forward(ctx, logits, labels, known_lse, options, inplace_backward, process_group):
        losses, lse, z_losses = kernels.forward(
            logits, labels, known_lse, *options, process_group is not None
        )
        if process_group is not None:
            losses, lse, z_losses = _combine(losses, lse, labels, options, process_group)
        ctx.save_for_backward(logits, labels, lse)
        ctx.mark_non_differentiable(z_losses)
        ctx.options, ctx.inplace_backward = options, inplace_backward
        return losses, z_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses, _):
        logits, labels, lse = ctx.saved_tensors
        if ctx.inplace_backward and may_overwrite_saved(ctx):
            kernels.backward_in_place(dlosses, logits, labels, lse, *ctx.options)
            torch.autograd.graph.increment_version(logits)  # a second backward is refused
            dlogits = logits
        else:
            dlogits = kernels.backward(dlosses, logits, labels, lse, *ctx.options)
        return dlogits, None, None, None, None, None


# --- Public function and module -------------------------------------------------------------------


@checked
def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, in nats; see the module for the formula.

    Args:
      logits: [..., V], float32, float16 or bfloat16.
      labels: [...], int64 or int32, in [0, V) or ignore_index.
      precomputed_lse: [...], float32, log(sum(exp(logits))) if it is known, so that forward need
        not read the logits. Used where logit_scale is 1 and label_smoothing 0. Without gradient.
        With process_group, that of this process's columns.
      label_smoothing: in [0, 1], the share of the target spread evenly over the classes.
      logit_scale: more than 0, multiplies the logits.
      lse_square_scale: at least 0, the factor of the z-loss.
      ignore_index: rows with this label have loss 0 and gradient 0.
      inplace_backward: backward writes the gradient into the logits, which are lost; a second
        backward is refused. Compiled graphs and torch.func write a tensor of its own
        nevertheless.
      process_group: the classes are spread over its processes, V on each, in the order of the
        ranks; labels count over all of them and are the same on each, as are the results.
      vocab_size: columns from here on (over all processes) are padding: in no sum, gradient 0.

    Returns (losses, z_losses), float32 [...]: the loss, z-loss included, and the z-loss alone,
    which has no gradient.

    Saved for backward: logits, labels, and the float32 log-sum-exp of each row. Any strides are
    taken: rows that are strided are read as they are, all else is copied.

    Raises:
      ValueError: an argument does not fit; on the CPU also a label. On CUDA, which does not wait to
        find out, a label out of range makes its loss and gradient NaN; with
        FLASHTRAIN_CHECK_LABELS=1 in the environment each call waits and raises.
      RuntimeError: the device reported an error.
    """
    check_matrix("logits", logits)
    check_labels_fit(labels, logits)
    if inplace_backward:
        check_written("logits", logits)
    check_options(label_smoothing, logit_scale, lse_square_scale)
    if precomputed_lse is not None:
        check_rows("precomputed_lse", precomputed_lse, (torch.float32,), logits)
        if label_smoothing != 0.0 or logit_scale != 1.0:
            precomputed_lse = None
    columns, first_class = logits.shape[-1], 0
    if process_group is not None:
        if dist.get_world_size(process_group) == 1:
            process_group = None
        else:
            first_class = columns * dist.get_rank(process_group)
            columns *= dist.get_world_size(process_group)
    options = Options(
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        first_class,
        num_classes_of(vocab_size, columns),
    )
    return _CrossEntropy.apply(
        logits, labels, precomputed_lse, options, inplace_backward, process_group
    )


def reduce_losses(losses: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """losses or z-losses; "mean" is over the rows that are not ignored, 0 where there are none."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / kernels.is_counted(labels, ignore_index).sum().clamp(min=1)


class CrossEntropyLoss(nn.Module):
    """`cross_entropy_loss`, reduced.

    Args:
      reduction: "mean" over the rows that are not ignored (0 if there are none), "sum" or "none".
      return_z_loss: return (loss, z_loss), the latter without gradient, rather than loss.
      The others: see `cross_entropy_loss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: dist.ProcessGroup | None = None,
        return_z_loss: bool = False,
        *,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_options(label_smoothing, logit_scale, lse_square_scale)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss
        self.vocab_size = vocab_size

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input: logits [..., V]; target: labels [...]."""
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
            vocab_size=self.vocab_size,
        )
        loss = reduce_losses(losses, target, self.ignore_index, self.reduction)
        if not self.return_z_loss:
            return loss
        return loss, reduce_losses(z_losses, target, self.ignore_index, self.reduction)
