"""The training loop, from top to bottom.

A run is a pure function of its config: the samples of a step (batches.py, flashtrain.data) and its
random numbers (rng.py) depend on the seeds and the step alone. So a run that was killed and
continued ends bit for bit like one that was not, given the same number of ranks and threads.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashtrain import distributed, files
from flashtrain.data import BatchLoader
from flashtrain.distributed import World
from flashtrain.environment import on_stop_signals
from flashtrain.errors import RunInterruptedError, TrainingDivergedError, UserError
from flashtrain.eval import parse_benchmarks
from flashtrain.train import checkpoint, meters
from flashtrain.train.batches import BatchPlan
from flashtrain.train.config import RunConfig
from flashtrain.train.console import say
from flashtrain.train.estimate import memory_of, with_micro_batch
from flashtrain.train.evaluation import Evaluation
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
from flashtrain.train.task import build_task


def train(
    config: RunConfig,
    workdir: Path | None,
    command: Sequence[str],
    *,
    resume: bool = False,
    profile: range = range(0),
) -> None:
    """Trains or continues the run in `workdir`; prints its summary as the last line of stdout.

    Args:
        config: checked by RunConfig.from_mapping.
        workdir: the run's folder; None: a new one, see run_folder.py.
        command: the command line, for the log.
        resume: there must be a checkpoint to continue from.
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
        memory = world.least(memory_of(world.device, world.local_size))
        config = with_micro_batch(config, world.size, memory)
        Trainer(config, world, folder, command, profile).run(resume)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory with a micro batch of {config.data['batch_size']} sequences; lower "
            f"--config.data.batch_size, the global batch stays as it is ({error})"
        ) from error
    # Not after an error: the others would fail without this rank before it has given its reason.
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

        benchmarks = parse_benchmarks(config.trainer.benchmarks)
        self.plan = BatchPlan(config, world.size)
        self.task = build_task(config, world)
        self.task.model.to(world.device)
        self.precision = Precision(config.trainer.precision, world.device)
        self.state = RunState.begin(
            config, world, self.task.model, self.precision, accumulates=self.plan.accumulates
        )
        self.strategy = self.state.strategy
        self.evaluation = Evaluation(
            config, world, self.task, self.state, self.precision, self.plan.micro, benchmarks
        )
        self.report = Report(config, world, self.task, self.plan)
        self.saver = Saver(folder.checkpoints, world, config.trainer)

        self.wall_seconds_before = 0.0  # of earlier processes
        self.stopwatch = meters.Stopwatch()
        self.timer = PhaseTimer(world.device)
        self.profiler = StepProfiler(profile, folder.path / "profile", world.rank, world.device)
        self.delayed = DelayedStats()
        self.signaled = False  # this process was asked to stop
        self.stop = False  # some process was, and all have agreed on the last step

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def run(self, resume: bool) -> None:
        """Resumes, trains to the last step, saves, measures and writes the summary."""
        try:
            self._run(resume)
        finally:
            with contextlib.suppress(Exception):  # not the reason for the end of the run
                self.saver.wait()  # for saves that have begun
            self.folder.close()

    def _run(self, resume: bool) -> None:
        on_stop_signals(self._on_signal)
        if self.world.is_main:
            self.folder.open()
        self.world.barrier()
        self.folder.check_shared(self.world.rank)
        self._resume(required=resume)
        if self._is_finished():
            return
        progress = self.progress
        with RunLog(
            self.folder if self.world.is_main else None,
            step=progress.step,
            max_steps=self.config.trainer.max_steps,
            # A process that was killed may have logged results that its checkpoint does not have.
            logged_again=progress.not_measured(),
        ) as self.log:
            self.report.start(self.log, progress.step, self.command, self.folder.path)
            try:
                self._loop()
            except (OSError, UserError) as error:
                self._save_before(error)
                raise
            self._save()
            self._wait_until_saved()
            sample = self._measure_last()
        progress.wall_seconds = self._wall_seconds()
        if self.world.is_main:
            self.report.finish(progress, self.stopwatch.total, self.folder, sample)

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
        if progress.step < trainer.max_steps:
            # The last process may have been stopped or killed between a save and the work after it.
            self._evaluate(**self._due())
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

            save, due = _is_due(progress.step, trainer.save_every), self._due()
            if not self.stopwatch.running and (trouble := self.strategy.compile_trouble()):
                self.log.note(trouble)
            # A process's first step compiles and allocates: it is waited for and not timed.
            if save or any(due.values()) or last or self.stop or not self.stopwatch.running:
                self._record(self.delayed.flush())
                self.stopwatch.stop()
                if ((save or due["benchmarks"]) and not progress.bad_in_a_row) or self.stop:
                    self._save()  # first: the rest may be slow, and may fail
                self._leave_if_stopped()
                if not last:
                    self._evaluate(**due)
                    self.stopwatch.start()
        loader.close()

    def _record(self, stats: StepStats | None) -> None:
        """Records a step. Raises TrainingDivergedError when too many were skipped."""
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
        progress = self.progress
        progress.skipped_steps += stats.skipped
        if not stats.skipped or stats.searches_loss_scale:
            progress.bad_in_a_row = 0
            return
        progress.bad_in_a_row += 1
        self.report.skipped(self.log, stats, progress.bad_in_a_row)
        if progress.bad_in_a_row >= self.config.trainer.max_bad_steps:
            self._wait_until_saved()
            raise TrainingDivergedError(
                f"loss or gradient was not finite or spiked {progress.bad_in_a_row} steps in a "
                f"row, up to step {stats.step}; {self.saver.last_good()}: lower optim.lr, or use "
                "precision bf16 or fp32, in another --workdir"
            )

    def _due(self) -> dict[str, bool]:
        """The measurements that are due after the step."""
        trainer, step = self.config.trainer, self.progress.step
        return {
            "validation": _is_due(step, trainer.eval_every),
            "benchmarks": bool(trainer.benchmarks) and _is_due(step, trainer.benchmark_every),
        }

    def _measure_last(self) -> str:
        """All measurements of the last step, which has been saved; returns a sample."""
        try:
            self._evaluate(validation=True, benchmarks=True)
            sample = self.evaluation.sample()
        except RunInterruptedError:
            raise
        except (OSError, UserError) as error:
            reason = files.cause(error) if isinstance(error, OSError) else error
            raise UserError(
                f"step {self.progress.step} is saved, but could not be measured: {reason}; start "
                f"again with --workdir={self.folder.path} to measure it"
            ) from error
        self._wait_until_saved()
        return sample

    def _evaluate(self, *, validation: bool, benchmarks: bool) -> None:
        """Measures the step unless that was done; adds the results to its checkpoint, if any."""
        progress = self.progress
        before = progress.val_step, progress.benchmark_step
        if validation and progress.val_step != progress.step:
            finished = self.evaluation.validate(self.log, interrupted=lambda: self.signaled)
            self.stop |= not finished
        if benchmarks and not self.stop and progress.benchmark_step != progress.step:
            self.evaluation.run_benchmarks(self.log)
        measured = before != (progress.val_step, progress.benchmark_step)
        if measured and self.saver.step == progress.step:
            self.saver.amend({"progress": dataclasses.asdict(progress)})
        self._leave_if_stopped()

    def _resume(self, *, required: bool) -> None:
        """Continues from the newest whole checkpoint, if there is one."""
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
            self.state.restore(
                found, self.config, self.world, self.task.config_class, self.task.metadata
            )
            self.saver.go_on_from(found)
            progress = self.progress
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
            self.report.repeat(summary)
        return True

    def _save(self) -> None:
        """Begins a checkpoint of the current step, unless there is one."""
        progress = self.progress
        if self.saver.step == progress.step:
            return
        if not self.state.are_finite(self.world):
            self._wait_until_saved()
            raise TrainingDivergedError(
                f"weights or moments are not finite after step {progress.step}, which is not "
                f"saved; {self.saver.last_good()}: lower optim.lr, raise optim.eps, or use "
                "precision bf16 or fp32, in another --workdir"
            )
        progress.wall_seconds = self._wall_seconds()
        progress.timed_steps = self.stopwatch.steps
        progress.timed_samples = self.stopwatch.samples
        progress.timed_seconds = self.stopwatch.seconds
        if self.world.is_main and self.folder.was_removed():
            self.log.note(f"{self.folder.path} was removed while the run goes on; it is made again")
            self.folder.open()
        self.log.flush()
        manifest = {
            "config": self.config.to_dict(),
            "versions": meters.versions(),
            "data": self.task.metadata,
            "state": self.state.plain(),
        }
        self.saver.save(progress.step, self.state.tensors(self.world), manifest)

    def _save_before(self, error: Exception) -> None:
        """Saves the finished steps, if possible, when something between two steps has failed.

        One of several ranks cannot do so alone: the others may wait for it in the next step.
        """
        handled = isinstance(error, (RunInterruptedError, TrainingDivergedError))
        if self.world.size > 1 or handled or not self.progress.step:
            return
        with contextlib.suppress(OSError, UserError):  # it may be the save that has failed
            self._record(self.delayed.flush())
            self._save()
            self.saver.wait()
            self.log.note(f"step {self.progress.step} is saved")

    def _wait_until_saved(self) -> None:
        """Returns when the last checkpoint is whole: a rank that exits ends the others."""
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

    def _wall_seconds(self) -> float:
        return self.wall_seconds_before + time.perf_counter() - self.began


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
