"""What a checkpoint holds of a run, and how it comes back.

The position in the data and in the schedule is no state of its own: it is the step.
"""

import dataclasses
from typing import Any

import torch

from flashtrain.distributed import World
from flashtrain.errors import UserError
from flashtrain.train import checkpoint, rng
from flashtrain.train.checkpoint import Checkpoint, Reader
from flashtrain.train.config import RunConfig, contradictions
from flashtrain.train.ema import Ema
from flashtrain.train.guard import Guard
from flashtrain.train.optimizer import Optimizer
from flashtrain.train.precision import LossScale
from flashtrain.train.saver import Held
from flashtrain.train.strategy import Shard, Strategy

_SHOWN_KEYS = 8  # of a config that contradicts; the rest is counted


@dataclasses.dataclass
class Progress:
    """How far a run has come, summed over all the processes that worked on it."""

    step: int = 0  # optimizer steps done, skipped ones included
    train_loss: float | None = None  # of the last step
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last validation
    val_step: int = 0  # when that was
    benchmarks: dict[str, float] = dataclasses.field(default_factory=dict)  # the last results
    skipped_steps: int = 0
    bad_in_a_row: int = 0  # skipped steps up to now
    wall_seconds: float = 0.0  # from the start of each process
    timed_steps: int = 0  # see meters.Stopwatch
    timed_samples: int = 0
    timed_seconds: float = 0.0


@dataclasses.dataclass
class RunState:
    """Everything that the next step depends on, besides the config, on one rank."""

    strategy: Strategy
    optimizer: Optimizer
    loss_scale: LossScale
    guard: Guard
    ema: Ema | None
    progress: Progress

    def tensors(self, world: World) -> dict[str, Held]:
        """This rank's part of the tensors to save, about an equal share of all."""
        held = {}
        for shard in self._shards_to_save(world):
            held[f"model.{shard.name}"] = Held(shard.tensor, shard.first_row)
            for key, value in self.optimizer.state(shard).items():
                first_row = shard.first_row if value.ndim else None  # a step count has no rows
                held[f"optimizer.{shard.name}.{key}"] = Held(value, first_row)
            if self.ema is not None:
                average = self.ema.averages[shard.name]
                held[f"ema.{shard.name}"] = Held(average, shard.first_row)
        return held

    def plain(self) -> dict[str, Any]:
        """What is no tensor, the same on every rank, as JSON can hold it."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "loss_scale": self.loss_scale.state(),
            "guard": self.guard.state(),
            "rng": rng.rng_state(),
        }

    def restore(self, saved: Checkpoint, config: RunConfig, model_class: type) -> None:
        """Takes up a checkpoint; `model_class` is the dataclass of the config's section `model`.

        Raises:
            UserError: the config contradicts the checkpoint's, or the model is another one; nothing
                has been changed then.
        """
        # 1. The config: nothing is loaded that belongs to another run.
        _refuse_contradictions(saved, config, model_class)
        # 2. The files, whose checksums have been verified; no code in them is run.
        reader = Reader(saved)
        shapes = {shard.name: shard.shape for shard in self.strategy.shards}
        checkpoint.check_fits(saved, reader, shapes)
        if self.ema is not None:
            checkpoint.check_fits(saved, reader, shapes, "ema.")
        # 3. Weights, into the memory that model and optimizer share.
        for shard in self.strategy.shards:
            _copy_rows(reader, f"model.{shard.name}", shard, shard.tensor)
            if self.ema is not None and shard.name in self.ema.averages:
                _copy_rows(reader, f"ema.{shard.name}", shard, self.ema.averages[shard.name])
        # 4. Moments of the part that this rank updates.
        for shard in self.optimizer.owned:
            prefix = f"optimizer.{shard.name}."
            moments = {
                n.removeprefix(prefix): _rows(reader, n, shard) for n in reader.names(prefix)
            }
            if moments:
                self.optimizer.load_state(shard, moments)
        # 5. Loss scale, guard, and random states after all that draws numbers while it is built.
        self.loss_scale.load_state(saved.state["loss_scale"])
        self.guard.load_state(saved.state["guard"])
        rng.set_rng_state(saved.state["rng"])
        # 6. Counters; with the step comes the position in the data and in the schedule.
        self.progress = Progress(**saved.state["progress"])

    def _shards_to_save(self, world: World) -> list[Shard]:
        owned = list(self.optimizer.owned)
        if self.strategy.name != "ddp":
            return owned  # nobody else has their moments
        # Every rank holds everything: the largest first to whom has the least so far.
        loads = [0] * world.size
        mine = []
        for shard in sorted(owned, key=lambda s: s.tensor.numel(), reverse=True):
            rank = loads.index(min(loads))
            loads[rank] += shard.tensor.numel()
            if rank == world.rank:
                mine.append(shard)
        return mine


def _rows(reader: Reader, name: str, shard: Shard) -> torch.Tensor:
    """The rows of a saved tensor that belong to a shard."""
    if shard.first_row is None or not reader.shape(name):
        return reader.read(name)
    return reader.read(name, shard.first_row, shard.tensor.shape[0])


@torch.no_grad()
def _copy_rows(reader: Reader, name: str, shard: Shard, target: torch.Tensor) -> None:
    if target.numel():
        target.copy_(_rows(reader, name, shard))


def _refuse_contradictions(saved: Checkpoint, config: RunConfig, model_class: type) -> None:
    differing = contradictions(saved.manifest["config"], config.to_dict(), model_class)
    if differing:
        shown = ", ".join(differing[:_SHOWN_KEYS])
        more = len(differing) - _SHOWN_KEYS
        raise UserError(
            f"the config contradicts the checkpoint {saved.path} in {shown}"
            f"{f' and {more} more keys' if more > 0 else ''}; give the same values or choose "
            "another --workdir"
        )
