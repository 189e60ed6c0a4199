"""The training loop, from top to bottom.

A run is a pure function of its config: the samples of a step (flashtrain.data) and its random
numbers (rng.py) depend on the seeds and the step alone. So a run that was killed and continued ends
bit for bit like one that was not, given the same number of ranks and threads.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtrain import distributed
from flashtrain.distributed import World
from flashtrain.errors import RunInterruptedError, TrainingDivergedError, UserError
from flashtrain.train import checkpoint, meters, rng, state
from flashtrain.train.build import batch_sizes, build_dataset, build_model
from flashtrain.train.config import RunConfig
from flashtrain.train.evaluate import validation_loss, write_sample
from flashtrain.train.optimizer import build_optimizer
from flashtrain.train.precision import Precision
from flashtrain.train.run_folder import RunFolder, default_workdir
from flashtrain.train.run_log import RunLog, finite_or_none
from flashtrain.train.schedule import learning_rate
from flashtrain.train.stats import DelayedStats, StepStats
from flashtrain.train.step import TrainStep


def train(config: RunConfig, workdir: Path | None, command: Sequence[str]) -> None:
    """Trains, or goes on with, the run in `workdir`; prints its summary as the last line of stdout.

    Args:
        config: checked by RunConfig.from_mapping.
        workdir: the run's folder; None: a new one, see run_folder.py.
        command: the command line, for the log.

    Raises:
        UserError: see flashtrain.errors; RunInterruptedError and TrainingDivergedError among them.
    """
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    world = distributed.start(config.trainer.device)
    try:
        path = world.broadcast(workdir or default_workdir(config.name))
        folder = RunFolder(path)
        if world.is_main:
            folder.check_writable()  # now rather than after the data has been prepared
        Trainer(config, world, folder, command).run()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory with a micro batch of {config.data['batch_size']} sequences; lower "
            f"--config.data.batch_size, the global batch stays as it is ({error})"
        ) from error
    # Not after an error: the others would fail for want of this rank before it has told its reason.
    distributed.stop()


class Trainer:
    """One run in one process."""

    def __init__(self, config: RunConfig, world: World, folder: RunFolder, command: Sequence[str]):
        self.config = config
        self.world = world
        self.folder = folder
        self.command = command
        self.began = time.perf_counter()

        self.batch = batch_sizes(config, world.size)
        self.dataset = build_dataset(config, world)
        rng.seed_everything(config.trainer.seed)
        self.model = build_model(config, self.dataset).to(world.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.precision = Precision(config.trainer.precision, world.device)

        self.progress = state.Progress()
        self.wall_seconds_before = 0.0  # of earlier processes
        self.saved_step: int | None = None
        self.sample: str | None = None
        self.stopwatch = meters.Stopwatch()
        self.delayed = DelayedStats()
        self.signaled = False  # this process was asked to stop
        self.stop = False  # some process was, and all have agreed on after which step

    def run(self) -> None:
        """Resumes, trains to the last step, validates, saves and writes the summary."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self.world.is_main:
            self.folder.open()
        self._resume()
        if self._is_finished():
            return
        with RunLog(
            self.folder if self.world.is_main else None,
            step=self.progress.step,
            max_steps=self.config.trainer.max_steps,
        ) as self.log:
            self._log_start()
            self._loop()
            if self.progress.val_step != self.progress.step:
                self._validate()
            self._save()
            self._leave_if_stopped()
        if self.world.is_main:
            self._finish()

    def _loop(self) -> None:
        trainer = self.config.trainer
        model = torch.compile(self.model, dynamic=False) if trainer.compile else self.model
        self.forward = model
        train_step = TrainStep(
            self.config, self.world, self.batch, model, self.optimizer, self.precision
        )
        progress = self.progress
        # A signal may have cut off the validation of the step it saved.
        if _is_due(progress.step, trainer.eval_every) and progress.val_step != progress.step:
            self._validate()
            self._leave_if_stopped()
        if progress.step < trainer.max_steps:
            batch = self._load_batch(progress.step)
        while progress.step < trainer.max_steps:
            values = train_step(progress.step, *batch, asked_to_stop=self.signaled)
            progress.step += 1
            last = progress.step == trainer.max_steps
            if not last:
                batch = self._load_batch(progress.step)  # while the device is at work
            self._record(self.delayed.push(progress.step, values))

            validate = _is_due(progress.step, trainer.eval_every) and not last
            save = _is_due(progress.step, trainer.save_every) and not last
            # A process's first step compiles and allocates: it is waited for and not timed.
            if validate or save or last or self.stop or not self.stopwatch.running:
                self._record(self.delayed.flush())
                self.stopwatch.stop()
                if validate and not self.stop:
                    self._validate()
                if (save and not progress.bad_in_a_row) or self.stop:
                    self._save()
                self._leave_if_stopped()
                if not last:
                    self.stopwatch.start()

    def _load_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets of a step, int64 [B, T], on their way to the device."""
        batch = self.dataset.train_batch(
            step,
            self.config.trainer.global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        device = self.world.device
        if device.type == "cpu":
            return batch
        tokens_BT, targets_BT = (t.pin_memory().to(device, non_blocking=True) for t in batch)
        return tokens_BT, targets_BT

    def _record(self, stats: StepStats | None) -> None:
        """Takes note of a step. Raises TrainingDivergedError when too many were not finite."""
        if stats is None:
            return
        trainer, scaler = self.config.trainer, self.precision.scaler
        self.stop |= stats.stop
        self.progress.train_loss = stats.loss
        self.stopwatch.step()
        self._check_finite(stats)
        average = self.stopwatch.seconds_per_step
        self.log.progress(stats.step, stats.loss, self._tokens_per_second(average))
        if stats.step % trainer.log_every and stats.step != trainer.max_steps:
            return
        seconds = self.stopwatch.lap() or average
        speed = self._tokens_per_second(seconds)
        self.log.step_line(stats.step, stats.loss, speed, seconds)
        self.log.scalars(
            stats.step,
            {
                "train/loss": stats.loss,
                "train/grad_norm": stats.grad_norm,
                "train/lr": learning_rate(stats.step - 1, self.config.optim, trainer.max_steps),
                "train/skipped_steps": self.progress.skipped_steps,
                "train/loss_scale": scaler.get_scale() if scaler.is_enabled() else None,
                "perf/tokens_per_second": speed,
                "perf/mfu": self._mfu(speed),
                "perf/step_seconds": seconds,
                "perf/peak_memory_bytes": meters.peak_memory_bytes(self.world.device),
            },
        )

    def _check_finite(self, stats: StepStats) -> None:
        progress = self.progress
        progress.skipped_steps += stats.skipped
        # fp16 gradients overflow while the loss scale is searched for; the loss must not.
        searching = self.precision.scaler.is_enabled() and math.isfinite(stats.loss)
        if not stats.skipped or searching:
            progress.bad_in_a_row = 0
            return
        progress.bad_in_a_row += 1
        self.log.note(
            f"step {stats.step} skipped: loss {stats.loss}, gradient norm {stats.grad_norm} "
            f"({progress.bad_in_a_row} in a row)"
        )
        if progress.bad_in_a_row >= self.config.trainer.max_bad_steps:
            raise TrainingDivergedError(
                f"loss or gradient was not finite {progress.bad_in_a_row} steps in a row, up to "
                f"step {stats.step}; the last good checkpoint is kept in "
                f"{self.folder.checkpoints}: lower optim.lr, or use precision bf16 or fp32, in "
                "another --workdir"
            )

    def _validate(self) -> None:
        loss = validation_loss(
            self.forward,
            self.dataset,
            self.world,
            self.precision,
            self.batch.micro,
            interrupted=lambda: self.signaled,
        )
        if loss is None:
            self.stop = True
            return
        step = self.progress.step
        self.progress.val_loss, self.progress.val_step = loss, step
        self.log.note(f"step {step}: validation loss {loss:.4f}")
        self.log.scalars(step, {"val/loss": loss})
        if self.world.is_main:
            self.sample = self._write_sample()
            self.log.text(step, "sample", self.sample)
        self.log.flush()

    def _write_sample(self) -> str:
        """What the model writes now; nothing if that is not asked for or its loss is no number."""
        trainer, loss = self.config.trainer, self.progress.val_loss
        if not trainer.sample_tokens or loss is None or not math.isfinite(loss):
            return ""
        return write_sample(
            self.model, self.dataset, self.precision, trainer.sample_tokens, trainer.seed
        )

    def _resume(self) -> None:
        """Takes up the newest whole checkpoint, if there is one."""
        found = None
        if self.world.is_main:
            found = checkpoint.newest(self.folder.checkpoints, warn=_say)
        found = self.world.broadcast(found)
        if found is None:
            return
        self.progress = state.restore(
            found, self.config, self.model, self.optimizer, self.precision.scaler
        )
        self.saved_step = self.progress.step
        self.wall_seconds_before = self.progress.wall_seconds
        self.stopwatch = meters.Stopwatch(self.progress.timed_steps, self.progress.timed_seconds)
        if self.world.is_main:
            _say(f"continuing from step {self.progress.step} ({found.path})")

    def _is_finished(self) -> bool:
        """Whether an earlier process has ended this run; says so and repeats its summary."""
        summary = self.world.broadcast(self.folder.read_summary())
        step, max_steps = self.progress.step, self.config.trainer.max_steps
        if step < max_steps or summary is None or summary.get("step") != step:
            return False
        if self.world.is_main:
            _say(
                f"this run has finished: step {step} of {max_steps}; raise "
                "--config.trainer.max_steps to train on, or choose another --workdir"
            )
            print(json.dumps(summary), flush=True)
        return True

    def _save(self) -> None:
        """Rank 0 writes a checkpoint of the current step, unless there is one."""
        progress = self.progress
        if self.saved_step == progress.step:
            return
        self.saved_step = progress.step
        if not self.world.is_main:
            return
        progress.wall_seconds = self._wall_seconds()
        progress.timed_steps = self.stopwatch.steps
        progress.timed_seconds = self.stopwatch.seconds
        self.log.flush()
        checkpoint.save(
            self.folder.checkpoints,
            progress.step,
            state.capture(self.model, self.optimizer, self.precision.scaler, progress),
            {"config": self.config.to_dict(), "versions": meters.versions()},
            keep=self.config.trainer.keep_checkpoints,
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signaled = True

    def _leave_if_stopped(self) -> None:
        if self.stop:
            self.log.note(
                f"stopped by a signal after step {self.progress.step}, which is saved; start again "
                f"with --workdir={self.folder.path} to continue"
            )
            raise RunInterruptedError

    def _log_start(self) -> None:
        step = self.progress.step
        self.log.text(step, "config", json.dumps(self.config.to_dict(), indent=2))
        self.log.text(step, "command", shlex.join(self.command))
        self.log.text(step, "environment", json.dumps(meters.versions(), indent=2))
        self.log.note(
            f"{self.config.name}: {self.model.num_parameters():,} parameters, "
            f"{self.config.trainer.max_steps:,} steps of {self._tokens_per_step:,} tokens, "
            f"{self.world.size} x {self.world.device.type}, {self.config.trainer.precision}; "
            f"run folder {self.folder.path}"
        )

    def _finish(self) -> None:
        """Prints a sample and the summary, and writes the latter."""
        sample = self._write_sample() if self.sample is None else self.sample
        if sample:
            print(f"--- generated text ---\n{sample}\n----------------------")
        progress = self.progress
        speed = self._tokens_per_second(self.stopwatch.seconds_per_step)
        summary = {
            "config": self.config.to_dict(),
            "step": progress.step,
            "tokens": progress.step * self._tokens_per_step,
            "train/loss": finite_or_none(progress.train_loss),
            "val/loss": finite_or_none(progress.val_loss),
            "skipped_steps": progress.skipped_steps,
            "tokens_per_second": speed,
            "mfu": self._mfu(speed),
            "peak_memory_bytes": meters.peak_memory_bytes(self.world.device),
            "wall_seconds": self._wall_seconds(),
            "parameters": self.model.num_parameters(),
            "processes": self.world.size,
            "workdir": str(self.folder.path),
            "versions": meters.versions(),
        }
        self.folder.write_summary(summary)
        print(json.dumps(summary), flush=True)

    @property
    def _tokens_per_step(self) -> int:
        return self.config.trainer.global_batch_size * self.config.data["seq_len"]

    def _tokens_per_second(self, seconds_per_step: float | None) -> float | None:
        return self._tokens_per_step / seconds_per_step if seconds_per_step else None

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        """Share of the GPUs' peak bf16 FLOP/s that the model's own operations take."""
        peak = meters.peak_flops(self.world.device)
        if peak is None or tokens_per_second is None:
            return None
        flops_per_token = self.model.flops_per_token(self.config.data["seq_len"])
        return flops_per_token * tokens_per_second / (peak * self.world.size)

    def _wall_seconds(self) -> float:
        return self.wall_seconds_before + time.perf_counter() - self.began


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
