"""Learning rate as a pure function of the step.

With s the 0-based step, w the warm-up steps, n the last step's successor and p = (s - w) / (n - w):

    s < w       lr * (s + 1) / w                                  linear warm-up, never 0
    constant    lr
    linear      lr + (min_lr - lr) * p
    cosine      min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2      (Loshchilov & Hutter 2017, eq. 5)
"""

import math

from flashtrain.train.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """The learning rate of 0-based `step`; steps past `max_steps` keep the schedule's end."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    decay_steps = max(1, max_steps - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / decay_steps)
    if optim.schedule == "linear":
        return optim.lr + (optim.min_lr - optim.lr) * progress
    if optim.schedule == "cosine":
        return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    raise ValueError(f"unknown schedule {optim.schedule!r}")
