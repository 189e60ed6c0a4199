"""AdamW in plain torch, in any dtype: one parameter, one step; and its master copy."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns parameter and moments after step number `step` (from 1 on).

    Algorithm 2 of Loshchilov and Hutter 2019 (arXiv:1711.05101), the decay multiplied by the
    learning rate as in torch.optim.AdamW.
    """
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    corrected_avg = exp_avg / (1 - beta1**step)
    corrected_sq = exp_avg_sq / (1 - beta2**step)
    param = param - lr * weight_decay * param
    return param - lr * corrected_avg / (corrected_sq.sqrt() + eps), exp_avg, exp_avg_sq


def current_master(param: Tensor, master: Tensor) -> Tensor:
    """The float32 master that a step starts from.

    Where the parameter is not the rounded master, bit for bit, it was written since the last step,
    and the step starts from it.
    """
    same = master.to(param.dtype).view(torch.int16) == param.view(torch.int16)
    return torch.where(same, master, param.float())
