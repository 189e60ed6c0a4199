"""Learning rate as a pure function of the step.

With s the 0-based step, w the warm-up steps, n the run's steps, c = cycle_steps or n, d the
cooldown steps and p = min(1, (s - w) / (c - w)):

    s < w          warmup_lr + (lr - warmup_lr) * (s + 1) / w        linear warm-up, never its start
    constant       lr
    linear         lr + (min_lr - lr) * p
    cosine         min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2    (Loshchilov & Hutter 2017, eq. 5)
    wsd            lr until the last d steps, then linear to min_lr    (Hu et al. 2024, section 4)
    inverse_sqrt   max(min_lr, lr * sqrt(max(w, 1) / (s + 1)))    (Vaswani et al. 2017, section 5.3)

linear and cosine stay at min_lr after c: the flat tail of the GPT-3 recipes.
"""

import math

from flashtrain.train.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, max_steps: int) -> float:
    """The learning rate of 0-based `step`; steps past `max_steps` keep the schedule's end."""
    warmup, lr, min_lr = optim.warmup_steps, optim.lr, optim.min_lr
    if step < warmup:
        return optim.warmup_lr + (lr - optim.warmup_lr) * (step + 1) / warmup
    cycle = optim.cycle_steps or max_steps
    progress = min(1.0, (step - warmup) / max(1, cycle - warmup))
    match optim.schedule:
        case "constant":
            return lr
        case "linear":
            return lr + (min_lr - lr) * progress
        case "cosine":
            return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
        case "wsd":
            left = max(0, max_steps - step)
            return lr + (min_lr - lr) * max(0.0, 1 - left / max(1, optim.cooldown_steps))
        case "inverse_sqrt":
            return max(min_lr, lr * math.sqrt(max(warmup, 1) / (step + 1)))
    raise ValueError(f"unknown schedule {optim.schedule!r}")
