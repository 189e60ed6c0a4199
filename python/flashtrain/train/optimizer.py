"""AdamW with the recipes' parameter groups, steps that a device can skip, and named state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flashtrain.train.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of nn.Linear decay; biases, norms and embeddings (hence a tied head) do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in linear], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in linear], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW: one launch for all tensors, and it can skip a step on the device."""
    return torch.optim.AdamW(
        [g for g in parameter_groups(model, optim.weight_decay) if g["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def step_unless(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """One optimizer step, or none at all if `skip` (a bool scalar on the device) holds.

    The host never learns which: fused optimizers read torch.amp.GradScaler's `found_inf` on the
    device and then leave weights, moments and step counts as they are.
    """
    optimizer.grad_scale = None  # gradients are already unscaled
    optimizer.found_inf = skip.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name: independent of groups, their order and ranks."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Restores what `named_state` gave, whose tensors it may take over.

    Raises KeyError or ValueError where the state is another model's.
    Hyperparameters stay those of `optimizer`: they come from the config, not from a checkpoint.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    unknown = state.keys() - parameters.keys()
    if unknown:
        raise KeyError(f"optimizer state of unknown parameter {min(unknown)!r}")
    for name, entries in state.items():
        parameter = parameters[name]
        restored = {}
        for key, value in entries.items():
            if torch.is_tensor(value) and value.ndim > 0 and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {name}.{key} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
            restored[key] = value.to(parameter.device) if torch.is_tensor(value) else value
        optimizer.state[parameter] = restored
