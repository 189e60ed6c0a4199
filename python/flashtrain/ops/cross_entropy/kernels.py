"""The torch.library ops of cross_entropy: schema, fake, and the call of the extension.

Tensors are [..., V] and [...]; the extension takes the leading dimensions as rows.

    cross_entropy_forward            losses, lse, z_losses
    cross_entropy_backward           dlogits
    cross_entropy_backward_          the same, into the logits
    cross_entropy_forward_backward_  losses and z_losses, and the gradient into the logits: for who
                                     knows dlosses up front
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._library import as_rows, eager, launch_context, register, to_kernel


class Options(NamedTuple):
    """What the kernels take after their tensors."""

    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int
    first_class: int  # of this process's columns; 0 where it has them all
    num_classes: int  # of all processes


# --- Labels ---------------------------------------------------------------------------------------


def is_counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels are not ignore_index; torch compares int32 with a larger number's low bits."""
    return labels.long() != ignore_index


def check_labels(labels: Tensor, ignore_index: int, num_classes: int) -> None:
    """ValueError for a label that is out of range. On CUDA this waits for the device.

    So there it looks only with FLASHTRAIN_CHECK_LABELS=1 in the environment; without it such a
    label makes the loss NaN.
    """
    if labels.is_cuda and os.environ.get("FLASHTRAIN_CHECK_LABELS") != "1":
        return
    bad = is_counted(labels, ignore_index) & ((labels < 0) | (labels >= num_classes))
    if not bad.any():
        return
    index = bad.nonzero()[0].tolist()
    raise ValueError(
        f"labels{index} is {labels[tuple(index)].item()}; a label must be in [0, {num_classes}), "
        f"the number of classes, or be ignore_index = {ignore_index}"
    )


# --- Kernels and fakes ----------------------------------------------------------------------------


def loss_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """losses, lse, z_losses: float32, one for each row."""
    losses = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    return losses, torch.empty_like(losses), torch.empty_like(losses)


def _forward_kernel(logits: Tensor, labels: Tensor, known_lse: Tensor | None, *args):
    options, partial = Options(*args[:-1]), args[-1]
    if labels.is_cuda:
        check_labels(labels, options.ignore_index, options.num_classes)
    losses, lse, z_losses = loss_outputs(logits)
    _kernels.cross_entropy_forward(
        to_kernel(as_rows(logits)),
        to_kernel(labels.contiguous()),
        None if known_lse is None else to_kernel(known_lse.contiguous()),
        *options,
        partial,
        to_kernel(losses),
        to_kernel(lse),
        None if partial else to_kernel(z_losses),
        launch_context(logits),
    )
    return losses, lse, z_losses.zero_() if partial else z_losses


def _forward_fake(logits, *args):
    return loss_outputs(logits)


def _run_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, options: Options, dlogits: Tensor
) -> None:
    if any(dlosses.stride()):
        dlosses = dlosses.contiguous()
    _kernels.cross_entropy_backward(
        to_kernel(dlosses),
        to_kernel(logits),
        to_kernel(labels.contiguous()),
        to_kernel(lse),
        *options,
        to_kernel(dlogits),
        launch_context(logits),
    )


def _backward_fake(dlosses, logits, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_kernel(dlosses, logits, labels, lse, *options):
    dlogits = _backward_fake(dlosses, logits)
    _run_backward(dlosses, as_rows(logits), labels, lse, Options(*options), dlogits)
    return dlogits


def _backward_in_place_kernel(dlosses, logits, labels, lse, *options):
    rows = as_rows(logits.resolve_neg())
    _run_backward(dlosses, rows, labels, lse, Options(*options), rows)
    if rows is not logits:
        logits.copy_(rows)


def run_forward_backward(
    logits: Tensor,
    labels: Tensor,
    dlosses: Tensor,
    options: Options,
    losses: Tensor,
    z_losses: Tensor,
) -> None:
    """Fills losses and z_losses, and the logits with their gradient."""
    label_smoothing, logit_scale, lse_square_scale, ignore_index, _, num_classes = options
    _kernels.cross_entropy_forward_backward(
        to_kernel(logits),
        to_kernel(labels.contiguous()),
        to_kernel(dlosses.contiguous() if any(dlosses.stride()) else dlosses),
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        num_classes,
        to_kernel(losses),
        to_kernel(z_losses),
        to_kernel(logits),
        launch_context(logits),
    )


def _forward_backward_in_place_kernel(logits, labels, dlosses, *options):
    options = Options(*options)
    if labels.is_cuda:
        check_labels(labels, options.ignore_index, options.num_classes)
    losses, _, z_losses = loss_outputs(logits)
    rows = as_rows(logits.resolve_neg())
    run_forward_backward(rows, labels, dlosses, options, losses, z_losses)
    if rows is not logits:
        logits.copy_(rows)
    return losses, z_losses


def _forward_backward_in_place_fake(logits, *args):
    losses, _, z_losses = loss_outputs(logits)
    return losses, z_losses


# --- Schemas --------------------------------------------------------------------------------------

_OPTIONS = (
    "float label_smoothing, float logit_scale, float lse_square_scale, SymInt ignore_index, "
    "SymInt first_class, SymInt num_classes"
)

cross_entropy_forward = register(
    f"cross_entropy_forward(Tensor logits, Tensor labels, Tensor? known_lse, {_OPTIONS}, "
    "bool partial) -> (Tensor losses, Tensor lse, Tensor z_losses)",
    _forward_kernel,
    _forward_fake,
)
cross_entropy_backward = register(
    f"cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor lse, {_OPTIONS}) "
    "-> Tensor dlogits",
    _backward_kernel,
    _backward_fake,
)
cross_entropy_backward_ = register(
    "cross_entropy_backward_(Tensor dlosses, Tensor(a!) logits, Tensor labels, Tensor lse, "
    f"{_OPTIONS}) -> ()",
    _backward_in_place_kernel,
    lambda *args: None,
)
cross_entropy_forward_backward_ = register(
    "cross_entropy_forward_backward_(Tensor(a!) logits, Tensor labels, Tensor dlosses, "
    f"{_OPTIONS}) -> (Tensor losses, Tensor z_losses)",
    _forward_backward_in_place_kernel,
    _forward_backward_in_place_fake,
)


forward = eager(cross_entropy_forward, _forward_kernel)
backward = eager(cross_entropy_backward, _backward_kernel)
backward_in_place = eager(cross_entropy_backward_, _backward_in_place_kernel)
