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
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._arguments import checked
from flashtrain.ops._autograd import needs_autograd
from flashtrain.ops._cross_entropy_ops import Options
from flashtrain.ops._linear_cross_entropy_ops import (
    LinearCrossEntropy,
    linear_cross_entropy_forward,
)
from flashtrain.ops.cross_entropy import (
    check_labels_fit,
    check_matrix,
    check_options,
    check_reduction,
    num_classes_of,
    reduce_losses,
)


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
            count = (labels != ignore_index).sum().clamp(min=1).float()
        loss, z_loss = LinearCrossEntropy.apply(hidden, weight, bias, labels, count, options)
    else:
        losses, z_losses = linear_cross_entropy_forward(hidden, weight, bias, labels, *options)
        loss, z_loss = (
            reduce_losses(values, labels, ignore_index, reduction) for values in (losses, z_losses)
        )
    return (loss, z_loss) if return_z_loss else loss
