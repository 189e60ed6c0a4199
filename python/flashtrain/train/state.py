"""What a checkpoint holds of a run, and how it comes back.

The position in the data is no state of its own: it is the step.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from flashtrain.errors import UserError
from flashtrain.train import rng
from flashtrain.train.checkpoint import Checkpoint
from flashtrain.train.config import RunConfig, contradictions
from flashtrain.train.optimizer import load_named_state, named_state

_SHOWN_KEYS = 8  # of a config that contradicts; the rest is counted


@dataclasses.dataclass
class Progress:
    """How far a run has come, summed over all the processes that worked on it."""

    step: int = 0  # optimizer steps done, skipped ones included
    train_loss: float | None = None  # of the last step
    val_loss: float | None = None
    val_step: int = 0  # when val_loss was measured
    skipped_steps: int = 0
    bad_in_a_row: int = 0  # non-finite steps up to now
    wall_seconds: float = 0.0  # from the start of each process
    timed_steps: int = 0  # see meters.Stopwatch
    timed_seconds: float = 0.0


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> dict[str, Any]:
    """Everything that the next step depends on, besides the config."""
    return {
        "model": model.state_dict(),
        "optimizer": named_state(model, optimizer),
        "scaler": scaler.state_dict(),
        "rng": rng.rng_state(),
        "progress": dataclasses.asdict(progress),
    }


def restore(
    checkpoint: Checkpoint,
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Puts a checkpoint's state into the objects of a run that is about to go on.

    Raises:
        UserError: the config contradicts the checkpoint's, or the model is another one; nothing has
            been changed then.
    """
    # 1. The config: nothing is loaded that belongs to another run.
    differing = contradictions(checkpoint.manifest["config"], config.to_dict())
    if differing:
        shown = ", ".join(differing[:_SHOWN_KEYS])
        more = len(differing) - _SHOWN_KEYS
        raise UserError(
            f"the config contradicts the checkpoint {checkpoint.path} in {shown}"
            f"{f' and {more} more keys' if more > 0 else ''}; give the same values or choose "
            "another --workdir"
        )
    # 2. The file, whose checksum has been verified; no code in it is run.
    state = checkpoint.load()
    mismatch = _mismatch(state["model"], model)
    if mismatch:
        raise UserError(
            f"the checkpoint {checkpoint.path} is of another model: {mismatch}; choose another "
            "--workdir"
        )
    # 3. Weights before moments, which are kept by the parameters' names.
    model.load_state_dict(state["model"])
    load_named_state(model, optimizer, state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    # 4. Random states after everything that draws numbers while it is built.
    rng.set_rng_state(state["rng"])
    # 5. Counters; with the step comes the position in the data and in the schedule.
    return Progress(**state["progress"])


def _mismatch(saved: dict[str, torch.Tensor], model: nn.Module) -> str | None:
    """How a saved state differs from the model's in names or shapes; None if it fits."""
    own = model.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        if name not in own:
            return f"it has a tensor {name!r} that the model does not have"
        if name not in saved:
            return f"it lacks the model's tensor {name!r}"
        if saved[name].shape != own[name].shape:
            return (
                f"{name!r} has shape {tuple(saved[name].shape)}, in the model "
                f"{tuple(own[name].shape)}"
            )
    return None
