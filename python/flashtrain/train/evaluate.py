"""Validation over a whole split, shared among ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashtrain.distributed import World
from flashtrain.models.wrapping import evaluating
from flashtrain.train.precision import Precision
from flashtrain.train.strategy import Strategy
from flashtrain.train.task import Task


@torch.no_grad()
def validate(
    task: Task,
    strategy: Strategy,
    world: World,
    precision: Precision,
    batch_size: int,
    interrupted: Callable[[], bool],
) -> dict[str, float] | None:
    """Means over all items of the split, by the names in `task.metrics`, the same on every rank.

    Args:
        batch_size: samples at a time on each rank.
        interrupted: called before each batch; if it is true on any rank, there is no result.

    Returns:
        The means, or None if some rank was interrupted.
    """
    totals = torch.zeros(1 + len(task.metrics), dtype=torch.float64, device=world.device)
    stopped = torch.zeros((), dtype=torch.float64, device=world.device)
    batches = iter(task.val_batches(batch_size, world.rank, world.size))
    spare: Sequence[Tensor] | None = None  # computed again where the others still have batches
    with evaluating(task.model):
        while True:
            batch, stop = next(batches, None), interrupted()
            if strategy.lockstep:
                busy, stops = world.sum(torch.tensor([batch is not None, stop]).float()).tolist()
                stop = stops > 0
                if not busy or stop:
                    stopped += stop
                    break
                spare = batch or spare or _any_batch(task, world)
            elif batch is None or stop:
                stopped += stop
                break
            moved = [t.to(world.device) for t in (batch or spare)]  # type: ignore[union-attr]
            with precision.autocast():
                sums = task.val_sums(strategy.evaluate, moved)
            if batch is not None:
                totals += sums
    *sums, interruptions = world.sum(torch.cat([totals, stopped[None]])).tolist()
    if interruptions:
        return None
    return {name: value / sums[0] for name, value in zip(task.metrics, sums[1:], strict=True)}


def _any_batch(task: Task, world: World) -> Sequence[Tensor]:
    """A small batch for a rank that has none of the validation split."""
    return task.train_samples(0, world.size, rank=world.rank, world_size=world.size)
