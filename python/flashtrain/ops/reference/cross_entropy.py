"""Cross entropy in plain torch, of logits and of a linear layer's output."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses and z-losses of rows of logits [..., V].

    Arithmetic is float32, from the logits on, as one writes it in torch, or `compute_dtype` (see
    the package's docstring).
    """
    x = logits[..., :vocab_size].to(compute_dtype or torch.float32) * logit_scale
    lse = torch.logsumexp(x, -1)
    ignored = labels == ignore_index
    index = labels.masked_fill(ignored, 0).long().unsqueeze(-1)
    losses = lse - (1.0 - label_smoothing) * x.gather(-1, index).squeeze(-1)
    if label_smoothing > 0.0:
        losses = losses - label_smoothing * x.mean(-1)
    z_losses = lse_square_scale * lse.square()
    zero = torch.zeros_like(losses)
    return (
        torch.where(ignored, zero, losses + z_losses),
        torch.where(ignored, zero, z_losses).detach(),
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    compute_dtype: torch.dtype | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """The loss and z-loss, reduced, of logits = hidden @ weight.T + bias.

    `options` and `compute_dtype` are as in `cross_entropy_loss`. Without the latter, the logits
    have the dtype of hidden.
    """
    dtype = compute_dtype or hidden.dtype
    logits = torch.nn.functional.linear(
        hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
    results = cross_entropy_loss(
        logits, labels, ignore_index=ignore_index, compute_dtype=compute_dtype, **options
    )
    if reduction == "none":
        return results
    count = (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
    loss, z_loss = (values.sum() / count for values in results)
    return loss, z_loss
