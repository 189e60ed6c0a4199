"""The training loop, from top to bottom.

A run is a pure function of its config: the samples of a step (batches.py, flashtrain.data) and its
random numbers (rng.py) depend on the seeds and the step alone. So a run that was killed and
continued ends bit for bit like one that was not, given the same number of ranks and threads.
"""

import contextlib
import errno
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashtrain import distributed
from flashtrain.data import BatchLoader
from flashtrain.distributed import World
from flashtrain.errors import RunInterruptedError, TrainingDivergedError, UserError
from flashtrain.eval import parse_benchmarks
from flashtrain.train import checkpoint, meters
from flashtrain.train.batches import BatchPlan
from flashtrain.train.config import RunConfig
from flashtrain.train.console import answer, say
from flashtrain.train.ema import Ema
from flashtrain.train.evaluate import validate
from flashtrain.train.guard import Guard
from flashtrain.train.optimizer import Optimizer, decayed_names
from flashtrain.train.phases import PhaseTimer
from flashtrain.train.precision import Precision
from flashtrain.train.profiler import StepProfiler
from flashtrain.train.report import Report
from flashtrain.train.run_folder import RunFolder, default_workdir
from flashtrain.train.run_log import RunLog
from flashtrain.train.saver import Saver
from flashtrain.train.state import Progress, RunState
from flashtrain.train.stats import DelayedStats, StepStats
from flashtrain.train.step import TrainStep
from flashtrain.train.strategy import Strategy
from flashtrain.train.task import build_task

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def train(
    config: RunConfig,
    workdir: Path | None,
    command: Sequence[str],
    *,
    resume: bool = False,
    profile: range = range(0),
) -> None:
    """Trains, or goes on with, the run in `workdir`; prints its summary as the last line of stdout.

    Args:
        config: checked by RunConfig.from_mapping.
        workdir: the run's folder; None: a new one, see run_folder.py.
        command: the command line, for the log.
        resume: there must be a checkpoint to go on from.
        profile: steps to profile, counted from 1, see profiler.py.

    Raises:
        UserError: see flashtrain.errors; RunInterruptedError and TrainingDivergedError among them.
    """
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    world = distributed.start(config.trainer.device)
    path = world.broadcast(workdir or default_workdir(config.name))
    try:
        folder = RunFolder(path)
        if world.is_main:
            folder.check_writable()  # now rather than after the data has been prepared
        Trainer(config, world, folder, command, profile).run(resume)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory with a micro batch of {config.data['batch_size']} sequences; lower "
            f"--config.data.batch_size, the global batch stays as it is ({error})"
        ) from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"cannot write to the run folder {path}: {error.strerror}; what was saved is "
            "untouched: make room and start again with the same --workdir"
        ) from error
    # Not after an error: the others would fail for want of this rank before it has told its reason.
    distributed.stop()


class Trainer:
    """One run in one process."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: RunFolder,
        command: Sequence[str],
        profile: range,
    ):
        self.config = config
        self.world = world
        self.folder = folder
        self.command = command
        self.began = time.perf_counter()

        trainer = config.trainer
        self.benchmarks = parse_benchmarks(trainer.benchmarks)
        self.plan = BatchPlan(config, world.size)
        self.task = build_task(config, world)
        self.task.model.to(world.device)
        self.precision = Precision(trainer.precision, world.device)
        if trainer.low_precision_weights:
            self.precision.round_weights(self.task.model)
        decayed = decayed_names(self.task.model)
        self.strategy = Strategy(config, world, self.task.model, accumulates=self.plan.accumulates)
        zero1 = self.strategy.name == "zero1"
        optimizer = Optimizer(self.strategy.shards, decayed, config.optim, zero1=zero1)
        self.state = RunState(
            self.strategy,
            optimizer,
            self.precision.loss_scale,
            Guard(world.device, trainer.spike_zscore),
            Ema(self.strategy, trainer.ema_decay) if trainer.ema_decay else None,
            Progress(),
        )
        self.report = Report(config, world, self.task, self.plan)
        self.saver = Saver(folder.checkpoints, world, trainer)

        self.wall_seconds_before = 0.0  # of earlier processes
        self.saved_step: int | None = None
        self.sample: str | None = None
        self.stopwatch = meters.Stopwatch()
        self.timer = PhaseTimer(world.device)
        self.profiler = StepProfiler(profile, folder.path / "profile", world.rank, world.device)
        self.delayed = DelayedStats()
        self.signaled = False  # this process was asked to stop
        self.stop = False  # some process was, and all have agreed on after which step

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def run(self, resume: bool) -> None:
        """Resumes, trains to the last step, validates, saves and writes the summary."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self.world.is_main:
            self.folder.open()
        self.world.barrier()
        self.folder.check_shared(self.world.rank)
        self._resume(required=resume)
        if self._is_finished():
            return
        with RunLog(
            self.folder if self.world.is_main else None,
            step=self.progress.step,
            max_steps=self.config.trainer.max_steps,
        ) as self.log:
            self.report.start(self.log, self.progress.step, self.command, self.folder.path)
            self._loop()
            if self.progress.val_step != self.progress.step:
                self._validate()
            if self.benchmarks and not self.stop:
                self._run_benchmarks()
            self._save()
            self.saver.wait()
            self._leave_if_stopped()
        sample = self._write_sample() if self.sample is None else self.sample
        if self.world.is_main:
            self._finish(sample)

    def _loop(self) -> None:
        trainer, state, progress = self.config.trainer, self.state, self.progress
        train_step = TrainStep(
            self.config,
            self.world,
            self.plan,
            self.strategy,
            state.optimizer,
            self.precision,
            state.guard,
            state.ema,
            self.timer,
        )
        # A signal may have cut off the validation of the step it saved.
        if _is_due(progress.step, trainer.eval_every) and progress.val_step != progress.step:
            self._validate()
            self._leave_if_stopped()
        loader = BatchLoader(
            self.task,
            first_sample=self.plan.first_sample(progress.step),
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.world.device,
        )
        while progress.step < trainer.max_steps:
            last = progress.step + 1 == trainer.max_steps
            with self.profiler.step(progress.step + 1):
                self.timer.start()
                batch = loader.next(
                    self.plan.size(progress.step),
                    next_count=0 if last else self.plan.size(progress.step + 1),
                )
                self.timer.mark("data")
                values = train_step(progress.step, batch, asked_to_stop=self.signaled)
            progress.step += 1
            if note := self.profiler.finish(progress.step):
                self.log.note(note)
            self._record(self.delayed.push(progress.step, values))
            self.saver.check()

            evaluate = _is_due(progress.step, trainer.eval_every) and not last
            save = _is_due(progress.step, trainer.save_every) and not last
            bench = bool(self.benchmarks) and _is_due(progress.step, trainer.benchmark_every)
            if not self.stopwatch.running and (trouble := self.strategy.compile_trouble()):
                self.log.note(trouble)
            # A process's first step compiles and allocates: it is waited for and not timed.
            if evaluate or bench or save or last or self.stop or not self.stopwatch.running:
                self._record(self.delayed.flush())
                self.stopwatch.stop()
                if evaluate and not self.stop:
                    self._validate()
                if bench and not last and not self.stop:
                    self._run_benchmarks()
                if (save and not progress.bad_in_a_row) or self.stop:
                    self._save()
                self._leave_if_stopped()
                if not last:
                    self.stopwatch.start()
        loader.close()

    def _record(self, stats: StepStats | None) -> None:
        """Takes note of a step. Raises TrainingDivergedError when too many were skipped."""
        if stats is None:
            return
        trainer, progress = self.config.trainer, self.progress
        self.stop |= stats.stop
        progress.train_loss = stats.loss
        self.stopwatch.step(self.plan.size(stats.step - 1))
        self._check_skipped(stats)
        average = self.stopwatch.total
        self.log.progress(stats.step, stats.loss, self.report.shown(average))
        if stats.step % trainer.log_every == 0 or stats.step == trainer.max_steps:
            self.report.step(
                self.log,
                stats,
                progress.skipped_steps,
                self.stopwatch.lap() or average,
                self.timer.lap(),
                fp16=self.precision.loss_scale.enabled,
            )

    def _check_skipped(self, stats: StepStats) -> None:
        progress, loss_scale = self.progress, self.precision.loss_scale
        progress.skipped_steps += stats.skipped
        # fp16 gradients overflow while the loss scale is searched for; the loss must not.
        searching = (
            loss_scale.enabled
            and stats.loss_scale > 1
            and math.isfinite(stats.loss)
            and not math.isfinite(stats.grad_norm)
        )
        if not stats.skipped or searching:
            progress.bad_in_a_row = 0
            return
        progress.bad_in_a_row += 1
        self.report.skipped(self.log, stats, progress.bad_in_a_row)
        if progress.bad_in_a_row >= self.config.trainer.max_bad_steps:
            self._wait_until_saved()
            raise TrainingDivergedError(
                f"loss or gradient was not finite or spiked {progress.bad_in_a_row} steps in a "
                f"row, up to step {stats.step}; the last good checkpoint is kept in "
                f"{self.folder.checkpoints}: lower optim.lr, or use precision bf16 or fp32, in "
                "another --workdir"
            )

    def _validate(self) -> None:
        averaged = self.state.ema.in_place() if self.state.ema else contextlib.nullcontext()
        with averaged:
            metrics = validate(
                self.task,
                self.strategy,
                self.world,
                self.precision,
                self.plan.micro,
                interrupted=lambda: self.signaled,
            )
            if metrics is None:
                self.stop = True
                return
            step = self.progress.step
            self.progress.metrics, self.progress.val_step = metrics, step
            self.sample = self._write_sample()
        shown = ", ".join(f"validation {name} {value:.4f}" for name, value in metrics.items())
        self.log.note(f"step {step}: {shown}")
        self.log.scalars(
            step,
            {f"val/{name}": value for name, value in metrics.items()}
            | {"train/parameter_norm": self.strategy.parameter_norm().item()},
        )
        self.log.text(step, "sample", self.sample)
        self.log.flush()

    def _run_benchmarks(self) -> None:
        averaged = self.state.ema.in_place() if self.state.ema else contextlib.nullcontext()
        with averaged:
            results = self.task.run_benchmarks(
                self.benchmarks, self.world, self.precision, self.plan.micro
            )
        self.progress.benchmarks = results
        shown = ", ".join(f"{name} {value:.4f}" for name, value in results.items())
        self.log.note(f"step {self.progress.step}: {shown}")
        self.log.scalars(self.progress.step, {f"eval/{k}": v for k, v in results.items()})

    def _write_sample(self) -> str:
        """What the model writes now; nothing if that is not asked for or its loss is no number."""
        trainer = self.config.trainer
        if not trainer.sample_tokens or not math.isfinite(self.progress.metrics["loss"]):
            return ""
        if not self.world.is_main and not self.strategy.lockstep:
            return ""
        return self.task.write_sample(self.precision, trainer.sample_tokens, trainer.seed)

    def _resume(self, *, required: bool) -> None:
        """Takes up the newest whole checkpoint, if there is one."""
        found = None
        if self.world.is_main:
            found = checkpoint.newest(self.folder.checkpoints, warn=say)
        found = self.world.broadcast(found)
        if found is None:
            if required:
                raise UserError(
                    f"--resume: there is no checkpoint in {self.folder.checkpoints}; leave "
                    "--resume out to start over"
                )
        else:
            self.state.restore(found, self.config, self.task.config_class)
            progress = self.progress
            self.saved_step = progress.step
            self.wall_seconds_before = progress.wall_seconds
            self.stopwatch = meters.Stopwatch(
                progress.timed_steps, progress.timed_samples, progress.timed_seconds
            )
        if self.world.is_main:
            checkpoint.remove_unfinished(self.folder.checkpoints)
            if found is not None:
                say(f"continuing from step {self.progress.step} ({found.path})")

    def _is_finished(self) -> bool:
        """Whether an earlier process has ended this run; says so and repeats its summary."""
        summary = self.world.broadcast(self.folder.read_summary())
        step, max_steps = self.progress.step, self.config.trainer.max_steps
        if step < max_steps or summary is None or summary.get("step") != step:
            return False
        if self.world.is_main:
            say(
                f"this run has finished: step {step} of {max_steps}; raise "
                "--config.trainer.max_steps to train on, or choose another --workdir"
            )
            answer(json.dumps(summary))
        return True

    def _save(self) -> None:
        """Begins a checkpoint of the current step, unless there is one."""
        progress = self.progress
        if self.saved_step == progress.step:
            return
        self.saved_step = progress.step
        progress.wall_seconds = self._wall_seconds()
        progress.timed_steps = self.stopwatch.steps
        progress.timed_samples = self.stopwatch.samples
        progress.timed_seconds = self.stopwatch.seconds
        self.log.flush()
        manifest = {
            "config": self.config.to_dict(),
            "versions": meters.versions(),
            "data": self.task.metadata,
            "state": self.state.plain(),
        }
        self.saver.save(progress.step, self.state.tensors(self.world), manifest)

    def _wait_until_saved(self) -> None:
        """Returns when the last checkpoint is whole: a rank that leaves takes the others along."""
        self.saver.wait()
        self.world.barrier()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signaled = True

    def _leave_if_stopped(self) -> None:
        if self.stop:
            self._save()
            self._wait_until_saved()
            self.log.note(
                f"stopped by a signal after step {self.progress.step}, which is saved; start again "
                f"with --workdir={self.folder.path} to continue"
            )
            raise RunInterruptedError

    def _finish(self, sample: str) -> None:
        """Writes the summary, and prints it after a sample."""
        self.progress.wall_seconds = self._wall_seconds()
        summary = self.report.summary(self.progress, self.stopwatch.total, self.folder.path)
        self.folder.write_summary(summary)
        if sample:
            answer(f"--- generated text ---\n{sample}\n----------------------")
        answer(json.dumps(summary))

    def _wall_seconds(self) -> float:
        return self.wall_seconds_before + time.perf_counter() - self.began


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
