"""Measurements of a run's model between steps and at the end: loss, benchmarks, a sample."""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from flashtrain.distributed import World
from flashtrain.train.config import RunConfig
from flashtrain.train.evaluate import validate
from flashtrain.train.precision import Precision
from flashtrain.train.run_log import RunLog
from flashtrain.train.state import Progress, RunState
from flashtrain.train.task import Task


class Evaluation:
    """Measures the model of a run, with its averaged weights if there are any.

    Args:
        micro_batch: samples at a time on each rank.
        benchmarks: files by name.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        task: Task,
        state: RunState,
        precision: Precision,
        micro_batch: int,
        benchmarks: Mapping[str, Path],
    ):
        self._config = config
        self._world = world
        self._task = task
        self._state = state
        self._precision = precision
        self._micro_batch = micro_batch
        # Absolute now, since the current folder may change during the run.
        self._benchmarks = {name: file.absolute() for name, file in benchmarks.items()}
        self._sample: str | None = None

    def validate(self, log: RunLog, interrupted: Callable[[], bool]) -> bool:
        """Measures the whole validation split; False if a rank was interrupted, with no result."""
        with self._averaged():
            metrics = validate(
                self._task,
                self._state.strategy,
                self._world,
                self._precision,
                self._micro_batch,
                interrupted,
            )
            if metrics is None:
                return False
            progress = self._state.progress
            progress.metrics, progress.val_step = metrics, progress.step
            self._sample = self._write_sample(progress)
        shown = ", ".join(f"validation {name} {value:.4f}" for name, value in metrics.items())
        log.note(f"step {progress.step}: {shown}")
        log.scalars(
            progress.step,
            {f"val/{name}": value for name, value in metrics.items()}
            | {"train/parameter_norm": self._state.strategy.parameter_norm().item()},
        )
        log.text(progress.step, "sample", self._sample)
        log.flush()
        return True

    def run_benchmarks(self, log: RunLog) -> None:
        """Runs the benchmarks, if there are any."""
        if not self._benchmarks:
            return
        with self._averaged():
            results = self._task.run_benchmarks(
                self._benchmarks, self._world, self._precision, self._micro_batch
            )
        progress = self._state.progress
        progress.benchmarks, progress.benchmark_step = results, progress.step
        shown = ", ".join(f"{name} {value:.4f}" for name, value in results.items())
        log.note(f"step {progress.step}: {shown}")
        log.scalars(progress.step, {f"eval/{k}": v for k, v in results.items()})

    def sample(self) -> str:
        """The sample after the last validation, which may be another process's."""
        if self._sample is None:
            with self._averaged():
                self._sample = self._write_sample(self._state.progress)
        return self._sample

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self._state.ema.in_place() if self._state.ema else contextlib.nullcontext()

    def _write_sample(self, progress: Progress) -> str:
        """A sample of the model now; "" if none is asked for or the loss is not finite."""
        trainer = self._config.trainer
        if not trainer.sample_tokens or not math.isfinite(progress.metrics["loss"]):
            return ""
        if not self._world.is_main and not self._state.strategy.lockstep:
            return ""
        return self._task.write_sample(self._precision, trainer.sample_tokens, trainer.seed)
