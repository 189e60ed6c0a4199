"""The state of a run in a checkpoint, and how it is restored.

The position in the data and in the schedule is no state of its own: it is the step.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flashtrain.distributed import World
from flashtrain.errors import TrainingDivergedError, UserError
from flashtrain.train import checkpoint, rng
from flashtrain.train.checkpoint import Checkpoint, Reader
from flashtrain.train.config import RunConfig, contradictions
from flashtrain.train.ema import Ema
from flashtrain.train.guard import Guard
from flashtrain.train.optimizer import Optimizer, decayed_names
from flashtrain.train.precision import LossScale, Precision
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
    benchmark_step: int = 0  # when that was
    skipped_steps: int = 0
    bad_in_a_row: int = 0  # skipped steps up to now
    wall_seconds: float = 0.0  # from the start of each process
    timed_steps: int = 0  # see meters.Stopwatch
    timed_samples: int = 0
    timed_seconds: float = 0.0

    def not_measured(self) -> list[str]:
        """Prefixes of the scalars that measuring this step will give."""
        steps = {"val/": self.val_step, "eval/": self.benchmark_step}
        return [prefix for prefix, step in steps.items() if step != self.step]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Progress":
        """From the result of `dataclasses.asdict`. Raises ValueError or TypeError if it is not."""
        found = cls(**plain)
        for field in dataclasses.fields(cls):
            value, default = getattr(found, field.name), getattr(cls(), field.name)
            if isinstance(default, dict):
                fits = isinstance(value, dict) and all(map(_is_number, value.values()))
            elif type(default) is int:
                fits = type(value) is int and 0 <= value < 2**63
            else:
                fits = _is_number(value) or (value is None and default is None)
            if not fits:
                raise ValueError(f"{field.name} is {value!r:.80}")
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclasses.dataclass
class RunState:
    """Everything that the next step depends on, except the config, on one rank."""

    strategy: Strategy
    optimizer: Optimizer
    loss_scale: LossScale
    guard: Guard
    ema: Ema | None
    progress: Progress

    @classmethod
    def begin(
        cls,
        config: RunConfig,
        world: World,
        model: nn.Module,
        precision: Precision,
        *,
        accumulates: bool,
    ) -> "RunState":
        """The state before the first step; splits the model, which is on the device.

        Args:
            accumulates: some step has several micro batches.
        """
        trainer = config.trainer
        if trainer.low_precision_weights:
            precision.round_weights(model)
        decayed = decayed_names(model)
        strategy = Strategy(config, world, model, accumulates=accumulates)
        zero1 = strategy.name == "zero1"
        return cls(
            strategy,
            Optimizer(strategy.shards, decayed, config.optim, zero1=zero1),
            precision.loss_scale,
            Guard(world.device, trainer.spike_zscore),
            Ema(strategy, trainer.ema_decay) if trainer.ema_decay else None,
            Progress(),
        )

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
        """All values that are no tensors, the same on every rank, as JSON can hold them."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "loss_scale": self.loss_scale.state(),
            "guard": self.guard.state(),
            "rng": rng.rng_state(),
        }

    def are_finite(self, world: World) -> bool:
        """Whether all that a checkpoint would hold is finite, on every rank; waits for the device.

        An update can turn finite gradients into weights that are not finite: a square overflows, or
        a division is by an eps of 0.
        """
        finite = all_finite([held.tensor for held in self.tensors(world).values()])
        bad = torch.tensor(0.0 if finite else 1.0, device=world.device)
        return not world.sum(bad).item()

    def restore(
        self,
        saved: Checkpoint,
        config: RunConfig,
        world: World,
        model_class: type,
        data: Mapping[str, Any],
    ) -> None:
        """Restores a checkpoint.

        Args:
            model_class: the dataclass of the config's section `model`.
            data: the run's `Task.metadata`.

        Raises:
            UserError: the config contradicts the checkpoint's, the data or the model is another
                one, or the checkpoint is not one that a run writes.
            TrainingDivergedError: it holds values that are not finite.
        """
        # 1. Config and data: nothing is loaded that belongs to another run.
        _refuse_contradictions(saved, config, model_class, data)
        with _understood(saved):
            progress = Progress.from_plain(saved.state["progress"])
            if progress.step != saved.step:
                raise ValueError(f"the progress is of step {progress.step}")
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
        self.strategy.weights_written()
        if not self.are_finite(world):
            raise TrainingDivergedError(
                f"weights or moments in {saved.path} are not finite; move it out of "
                f"{saved.path.parent} to go on from the checkpoint before it"
            )
        # 5. Loss scale, guard, and random states, after everything that draws numbers when built.
        with _understood(saved):
            self.loss_scale.load_state(saved.state["loss_scale"])
            self.guard.load_state(saved.state["guard"])
            rng.set_rng_state(saved.state["rng"])
        # 6. Counters; with the step comes the position in the data and in the schedule.
        self.progress = progress

    def _shards_to_save(self, world: World) -> list[Shard]:
        owned = list(self.optimizer.owned)
        if self.strategy.name != "ddp":
            return owned  # no other rank has their moments
        # Every rank holds everything: the largest first, to the rank with the least so far.
        loads = [0] * world.size
        mine = []
        for shard in sorted(owned, key=lambda s: s.tensor.numel(), reverse=True):
            rank = loads.index(min(loads))
            loads[rank] += shard.tensor.numel()
            if rank == world.rank:
                mine.append(shard)
        return mine


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every number is finite; one pass over the memory, then waits for the device."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    # Largest magnitudes, which overflow in no dtype as sums of squares would.
    largest = [
        torch.stack(torch._foreach_norm(group, float("inf"))).max() for group in by_kind.values()
    ]
    return all(math.isfinite(value.item()) for value in largest)


def _rows(reader: Reader, name: str, shard: Shard) -> torch.Tensor:
    """The rows of a saved tensor that belong to a shard."""
    if shard.first_row is None or not reader.shape(name):
        return reader.read(name)
    return reader.read(name, shard.first_row, shard.tensor.shape[0])


@torch.no_grad()
def _copy_rows(reader: Reader, name: str, shard: Shard, target: torch.Tensor) -> None:
    if target.numel():
        target.copy_(_rows(reader, name, shard))


@contextlib.contextmanager
def _understood(saved: Checkpoint) -> Iterator[None]:
    """Around code that reads a checkpoint's state: a valid signature says little of the content."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as e:
        raise saved.unusable(f"its state is no run's: {type(e).__name__}: {e}") from e


def _refuse_contradictions(
    saved: Checkpoint, config: RunConfig, model_class: type, data: Mapping[str, Any]
) -> None:
    now = config.to_dict()
    with _understood(saved):
        before = saved.section("config")
        fingerprints = saved.section("data").get("fingerprint"), data.get("fingerprint")
        if all(fingerprints):
            if fingerprints[0] != fingerprints[1]:
                raise UserError(
                    f"the data is not that of the checkpoint {saved.path}: its checksum was "
                    f"{fingerprints[0]!r:.20}, now it is {fingerprints[1]!r:.20}; give the same "
                    "data or choose another --workdir"
                )
            before, now = _without_place(before), _without_place(now)  # it may have moved
        differing = contradictions(before, now, model_class)
    if differing:
        shown = ", ".join(differing[:_SHOWN_KEYS])
        more = len(differing) - _SHOWN_KEYS
        raise UserError(
            f"the config contradicts the checkpoint {saved.path} in {shown}"
            f"{f' and {more} more keys' if more > 0 else ''}; give the same values or choose "
            "another --workdir"
        )


def _without_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that does not say where its data is."""
    data = {key: v for key, v in config["data"].items() if key not in ("path", "source")}
    return {**config, "data": data}
