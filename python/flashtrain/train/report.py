"""The report of a run: at its start, every few steps, and in its summary."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from flashtrain.distributed import World
from flashtrain.train import meters
from flashtrain.train.batches import BatchPlan
from flashtrain.train.config import RunConfig
from flashtrain.train.console import answer, say
from flashtrain.train.meters import Speed
from flashtrain.train.run_folder import RunFolder
from flashtrain.train.run_log import RunLog, finite_or_none
from flashtrain.train.schedule import learning_rate
from flashtrain.train.state import Progress
from flashtrain.train.stats import StepStats
from flashtrain.train.task import Task

_SHOWN_MICRO_BATCHES = 4


class Report:
    """Turns a run's numbers into log entries and its summary."""

    def __init__(self, config: RunConfig, world: World, task: Task, plan: BatchPlan):
        self._config = config
        self._world = world
        self._task = task
        self._plan = plan

    def start(self, log: RunLog, step: int, command: Sequence[str], folder: object) -> None:
        """The config, the command, the machine, and a line that names the run."""
        config, plan = self._config, self._plan
        log.text(step, "config", json.dumps(config.to_dict(), indent=2))
        log.text(step, "command", shlex.join(command))
        log.text(step, "environment", json.dumps(meters.versions(), indent=2))
        entries = config.to_dict()
        sections = ("model", "data", "optim", "trainer")
        log.hyperparameters(
            {f"{name}.{key}": value for name in sections for key, value in entries[name].items()},
            metrics=("train/loss", "val/loss"),
        )
        last = config.trainer.max_steps - 1
        items = plan.size(last) * self._task.items_per_sample
        shared = f", {config.trainer.strategy}" if self._world.size > 1 else ""
        log.note(
            f"{config.name}: {self._task.num_parameters:,} parameters, "
            f"{config.trainer.max_steps:,} steps of {items:,} {self._task.item}, "
            f"{self._world.size} x {self._world.device.type}{shared}, micro batch {plan.micro}, "
            f"{config.trainer.precision}; run folder {folder}"
        )

    def step(
        self,
        log: RunLog,
        stats: StepStats,
        skipped_steps: int,
        lap: Speed | None,
        phases: Mapping[str, float],
        fp16: bool,
    ) -> None:
        """Line and scalars of a step that is logged; `phases` are shares of its time."""
        config = self._config
        log.step_line(stats.step, stats.loss, self.shown(lap), lap)
        lr = learning_rate(stats.step - 1, config.optim, config.trainer.max_steps)
        log.scalars(
            stats.step,
            {
                "train/loss": stats.loss,
                "train/grad_norm": stats.grad_norm,
                "train/lr": lr,
                "train/batch_size": self._plan.size(stats.step - 1),
                "train/skipped_steps": skipped_steps,
                "train/loss_scale": stats.loss_scale if fp16 else None,
                f"perf/{self._task.item}_per_second": self._items_per_second(lap),
                "perf/mfu": self._mfu(lap, self._task.flops_per_item),
                "perf/mfu_causal": self._mfu(lap, self._task.causal_flops_per_item),
                "perf/step_seconds": lap.seconds_per_step if lap else None,
                "perf/peak_memory_bytes": meters.peak_memory_bytes(self._world.device),
                **{f"time/{name}": share for name, share in phases.items()},
                **{f"gpu/{k}": v for k, v in meters.gpu_state(self._world.device).items()},
            },
        )

    def skipped(self, log: RunLog, stats: StepStats, in_a_row: int) -> None:
        """Lines that name the step and the samples that it was computed from."""
        step, plan = stats.step - 1, self._plan
        finite = math.isfinite(stats.loss)
        if finite and not math.isfinite(stats.grad_norm):
            # The micro batch is not known from the gradient.
            first = plan.first_sample(step)
            found = [("any of the step", range(first, first + plan.size(step)))]
        else:
            found = [
                (f"micro batch {i}", plan.micro_batch_samples(step, i))
                for i in stats.worst_micro_batches()
            ]
        places = [f"{where} (samples {s.start} to {s.stop - 1})" for where, s in found]
        if (more := len(found) - _SHOWN_MICRO_BATCHES) > 0:
            places[_SHOWN_MICRO_BATCHES:] = [f"{more} more"]
        kind = "a spike" if finite and math.isfinite(stats.grad_norm) else "not finite"
        lines = [
            f"step {stats.step} skipped: loss {stats.loss}, gradient norm {stats.grad_norm} "
            f"({in_a_row} in a row); {kind}, from {', '.join(places)}"
        ]
        for _, samples in found[:_SHOWN_MICRO_BATCHES]:
            lines += [f"  {line}" for line in self._task.describe(samples).splitlines()]
        log.note("\n".join(lines))

    def finish(
        self, progress: Progress, total: Speed | None, folder: RunFolder, sample: str
    ) -> None:
        """Writes the summary, and prints it after a sample.

        Raises:
            UserError: it cannot be written.
        """
        summary = self.summary(progress, total, folder.path)
        folder.write_summary(summary)
        if sample:
            answer(f"--- generated text ---\n{sample}\n----------------------")
        answer(json.dumps(summary))

    def repeat(self, summary: Mapping[str, Any]) -> None:
        """Says that an earlier process has ended the run, with its summary."""
        say(
            f"this run has finished: step {summary['step']} of {self._config.trainer.max_steps}; "
            "raise --config.trainer.max_steps to train on, or choose another --workdir"
        )
        answer(json.dumps(summary))

    def summary(self, progress: Progress, total: Speed | None, workdir: object) -> dict[str, Any]:
        """The outcome of a run, as JSON can hold it."""
        task = self._task
        return {
            "config": self._config.to_dict(),
            "step": progress.step,
            task.item: self._plan.first_sample(progress.step) * task.items_per_sample,
            "train/loss": finite_or_none(progress.train_loss),
            **{f"val/{name}": finite_or_none(v) for name, v in progress.metrics.items()},
            **{f"eval/{name}": finite_or_none(v) for name, v in progress.benchmarks.items()},
            "skipped_steps": progress.skipped_steps,
            f"{task.item}_per_second": self._items_per_second(total),
            "mfu": self._mfu(total, task.flops_per_item),
            "mfu_causal": self._mfu(total, task.causal_flops_per_item),
            "peak_memory_bytes": meters.peak_memory_bytes(self._world.device),
            "wall_seconds": progress.wall_seconds,
            "parameters": task.num_parameters,
            "processes": self._world.size,
            "workdir": str(workdir),
            "versions": meters.versions(),
        }

    def shown(self, speed: Speed | None) -> str:
        """The speed for a reader; "" if it is not known."""
        rate = self._items_per_second(speed)
        return "" if rate is None else f"{rate:,.0f} {self._task.item}/s"

    def _items_per_second(self, speed: Speed | None) -> float | None:
        return None if speed is None else speed.samples_per_second * self._task.items_per_sample

    def _mfu(self, speed: Speed | None, flops_per_item: int) -> float | None:
        """Share of the GPUs' peak bf16 FLOP/s that the model's own operations reach."""
        peak, rate = meters.peak_flops(self._world.device), self._items_per_second(speed)
        if peak is None or rate is None:
            return None
        return flops_per_item * rate / (peak * self._world.size)
