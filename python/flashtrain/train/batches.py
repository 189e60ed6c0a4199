"""The samples of each step, and how ranks cut them into micro batches.

The global batch never depends on the hardware: global = micro * accumulation * ranks. Samples are
numbered through the run, so a step's samples are `first_sample(step)` and those after it.

Batch-size ramp (Brown et al. 2020, section 2.3): over the first `batch_ramp_steps` steps the global
batch grows from f = `batch_ramp_from` to `global_batch_size` in equal stages of f, 2 f, 3 f, ...
"""

import dataclasses
import math
from collections.abc import Iterator

from flashtrain.errors import UserError
from flashtrain.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """How a global batch is cut: global = micro * accumulation * ranks, in samples."""

    micro: int
    accumulation: int


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Consecutive steps of one global batch size."""

    first_step: int
    first_sample: int
    size: int
    cut: BatchSizes


class BatchPlan:
    """The batch sizes of a run on a number of ranks.

    Raises:
        UserError: a global batch cannot be cut evenly; names the nearest sizes that can.
    """

    def __init__(self, config: RunConfig, ranks: int):
        stages: list[_Stage] = []
        for first_step, size, key in _ramp(config):
            before = 0
            if stages:
                last = stages[-1]
                before = last.first_sample + (first_step - last.first_step) * last.size
            cut = _cut(size, key, config.data["batch_size"], ranks)
            stages.append(_Stage(first_step, before, size, cut))
        self._stages = tuple(stages)
        self._ranks = ranks

    def size(self, step: int) -> int:
        """Samples of a 0-based step, over all ranks."""
        return self._stage(step).size

    def first_sample(self, step: int) -> int:
        """Number of a step's first sample; also the number of samples of the steps before."""
        stage = self._stage(step)
        return stage.first_sample + (step - stage.first_step) * stage.size

    def cut(self, step: int) -> BatchSizes:
        """The micro batches of a step on each rank."""
        return self._stage(step).cut

    @property
    def micro(self) -> int:
        """The largest micro batch of the run."""
        return max(stage.cut.micro for stage in self._stages)

    @property
    def accumulates(self) -> bool:
        """Whether some step has several micro batches."""
        return any(stage.cut.accumulation > 1 for stage in self._stages)

    def micro_batch_samples(self, step: int, index: int) -> range:
        """Sample numbers of micro batch `index` of a step, counted over all ranks."""
        first = self.first_sample(step) + index * self.cut(step).micro
        return range(first, first + self.cut(step).micro)

    def _stage(self, step: int) -> _Stage:
        return next(s for s in reversed(self._stages) if step >= s.first_step)


def micro_batches(config: RunConfig, ranks: int) -> list[int]:
    """The micro batches that can cut every global batch of a run evenly, ascending.

    Raises:
        UserError: no micro batch can.
    """
    sizes = [(size, key) for _, size, key in _ramp(config)]
    for size, key in sizes:
        _cut(size, key, 1, ranks)
    share = math.gcd(*(size // ranks for size, _ in sizes))
    return [n for n in range(1, share + 1) if share % n == 0]


def _ramp(config: RunConfig) -> Iterator[tuple[int, int, str]]:
    """(first step, global batch size, config key it comes from) of each stage."""
    trainer = config.trainer
    total, start, steps = (
        trainer.global_batch_size,
        trainer.batch_ramp_from,
        trainer.batch_ramp_steps,
    )
    if not start or not steps:
        yield 0, total, "trainer.global_batch_size"
        return
    if total % start:
        raise UserError(
            f"trainer.global_batch_size={total} is not a multiple of trainer.batch_ramp_from="
            f"{start}, by which the batch grows; the nearest that are: "
            f"{_nearest_multiples(total, start)}"
        )
    count = total // start
    for number in range(1, count + 1):
        first_step = -(-(number - 1) * steps // max(1, count - 1))  # rounded up
        yield first_step, number * start, "trainer.batch_ramp_from"


def _cut(total: int, key: str, micro: int, ranks: int) -> BatchSizes:
    """`micro` is the largest micro batch: it shrinks where a rank's share is smaller."""
    if total % ranks:
        raise UserError(
            f"{key}={total} cannot be shared evenly by {ranks} processes; the nearest that can: "
            f"{_nearest_multiples(total, ranks)}"
        )
    share = total // ranks
    micro = min(micro, share)
    if share % micro:
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        below, above = max(n for n in divisors if n < micro), min(n for n in divisors if n > micro)
        raise UserError(
            f"{key}={total} on {ranks} processes cannot be cut into micro "
            f"batches of data.batch_size={micro}; the nearest data.batch_size that fit: {below} or "
            f"{above}; the nearest {key}: {_nearest_multiples(total, micro * ranks)}"
        )
    return BatchSizes(micro, share // micro)


def _nearest_multiples(number: int, of: int) -> str:
    below, above = number // of * of, (number // of + 1) * of
    return f"{below} or {above}" if below else f"{above}"
