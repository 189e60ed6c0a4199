"""The log of a run: notes and progress on stderr, scalars and text in the run folder."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flashtrain import files
from flashtrain.train.console import heard_or_not, say
from flashtrain.train.log_file import EventFile, LogFile
from flashtrain.train.meters import Speed
from flashtrain.train.run_folder import RunFolder


class RunLog:
    """The log of a run on rank 0. Every method does nothing where there is no folder.

    A log that cannot be written does not end the run: one line says so, and the missing records are
    written when that is possible again.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        step: int,
        max_steps: int,
        logged_again: Sequence[str] = (),
    ):
        """Continues from `step`: records of an earlier process after it are dropped.

        A progress bar is shown on a terminal; elsewhere each logged step is a line.

        Args:
            logged_again: prefixes of scalars whose values of `step` itself are dropped too.

        Raises:
            UserError: the log of an earlier process cannot be read or replaced.
        """
        self._folder = folder
        self._step = step
        self._max_steps = max_steps
        self._bar = None
        self._events: EventFile | None = None
        self._metrics: LogFile | None = None
        self._failing = False
        if folder is None:
            return
        folder.drop_metrics_after(step, logged_again)
        with self._going_on():
            self._open(folder)
        if sys.stderr.isatty():
            from tqdm import tqdm  # here, since only rank 0 needs it

            self._bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)

    def note(self, line: str) -> None:
        """A line for the user."""
        if self._bar is not None:
            with heard_or_not(sys.stderr):
                self._bar.write(line, file=sys.stderr)
        elif self._folder is not None:
            say(line)

    def progress(self, step: int, loss: float, speed: str) -> None:
        """Shows how far the run is."""
        self._step = step
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f} {speed}".rstrip(), refresh=False)
            with heard_or_not(sys.stderr):
                self._bar.update(step - self._bar.n)

    def step_line(self, step: int, loss: float, speed: str, average: Speed | None) -> None:
        """The progress as a line, where there is no progress bar."""
        if self._bar is not None:
            return
        parts = [f"step {step}/{self._max_steps}", f"loss {loss:.4f}"]
        if average is not None:
            left = average.seconds_per_step * (self._max_steps - step)
            parts += [speed, f"{_duration(left)} left"]
        self.note(" | ".join(parts))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Logs numbers under their names; None is left out."""
        if self._folder is None:
            return
        from torch.utils.tensorboard.summary import scalar

        known = {name: value for name, value in values.items() if value is not None}
        numbers = {name: finite_or_none(value) for name, value in known.items()}
        line = json.dumps({"step": step, **numbers}) + "\n"
        with self._going_on():
            if self._metrics is not None:
                self._metrics.append(line.encode())
        self._add([scalar(name, value) for name, value in known.items()], step)

    def text(self, step: int, name: str, text: str) -> None:
        """Logs a text, shown as it is."""
        if self._folder is None:
            return
        from torch.utils.tensorboard.summary import text as summary

        indented = "\n".join("    " + line for line in text.splitlines())
        self._add([summary(name, _readable(indented))], step)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """For TensorBoard's HPARAMS page: one row per run, its last logged `metrics` beside it."""
        if self._folder is None:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {
            k: v if isinstance(v, (bool, int, float)) else _readable(str(v))
            for k, v in values.items()
        }
        # SummaryWriter.add_hparams would write them into a run of their own, without the curves.
        self._add(hparams(plain, dict.fromkeys(metrics, 0.0)))

    def flush(self) -> None:
        """Everything logged so far has been written, into files that are there."""
        if self._folder is None:
            return
        with self._going_on():
            open_files = [file for file in (self._metrics, self._events) if file is not None]
            lost = len(open_files) < 2 or not all(file.is_there() for file in open_files)
            if lost:
                self._close()
                self._open(self._folder)
            for file in open_files if not lost else []:
                file.append()
            if lost or self._failing:
                self._failing = False
                self.note(f"the log in {self._folder.path} goes on from step {self._step}")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            with heard_or_not(sys.stderr):
                self._bar.close()
            self._bar = None
        with self._going_on():
            for file in (self._metrics, self._events):
                if file is not None:
                    file.append()
        self._close()

    def _open(self, folder: RunFolder) -> None:
        self._events = EventFile(folder.tensorboard, purge_step=self._step + 1)
        self._metrics = LogFile(folder.metrics)

    def _close(self) -> None:
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
        self._metrics = self._events = None

    def _add(self, summaries: Sequence[Any], step: int | None = None) -> None:
        with self._going_on():
            if self._events is not None:
                self._events.add(summaries, step)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Around code that writes the log."""
        try:
            yield
        except OSError as error:
            if not self._failing and self._folder is not None:
                self._failing = True
                self.note(
                    f"the log in {self._folder.path} cannot be written: {files.cause(error)}; "
                    "training goes on, and checkpoints are not affected"
                )


def finite_or_none(value: float | None) -> float | None:
    """A number as JSON can hold it: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def _readable(text: str) -> str:
    """The text in valid UTF-8: paths and arguments may have any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
