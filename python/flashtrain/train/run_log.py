"""What a run tells its user: notes and progress on stderr, scalars and text in the run folder."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flashtrain.train.console import heard_or_not, say
from flashtrain.train.meters import Speed
from flashtrain.train.run_folder import RunFolder


class RunLog:
    """The log of a run on rank 0. Every method does nothing where there is no folder."""

    def __init__(self, folder: RunFolder | None, *, step: int, max_steps: int):
        """Goes on from `step`: what an earlier process logged after it is dropped.

        A progress bar is shown on a terminal; elsewhere each logged step is a line.
        """
        self._enabled = folder is not None
        self._max_steps = max_steps
        self._bar = None
        if folder is None:
            return
        # Imported here since both are slow to import and only rank 0 needs them.
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)
        folder.drop_metrics_after(step)
        self._metrics = open(folder.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)

    def note(self, line: str) -> None:
        """A line for the user."""
        if self._bar is not None:
            with heard_or_not(sys.stderr):
                self._bar.write(line, file=sys.stderr)
        elif self._enabled:
            say(line)

    def progress(self, step: int, loss: float, speed: str) -> None:
        """Shows how far the run is."""
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
        if not self._enabled:
            return
        known = {name: value for name, value in values.items() if value is not None}
        for name, value in known.items():
            self._writer.add_scalar(name, value, step)
        numbers = {name: finite_or_none(value) for name, value in known.items()}
        self._metrics.write(json.dumps({"step": step, **numbers}) + "\n")

    def text(self, step: int, name: str, text: str) -> None:
        """Logs a text, shown as it is."""
        if self._enabled:
            indented = "\n".join("    " + line for line in text.splitlines())
            self._writer.add_text(name, indented, step)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """For TensorBoard's HPARAMS page: one row a run, its last logged `metrics` beside it."""
        if not self._enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()
        }
        # SummaryWriter.add_hparams would write them into a run of their own, without the curves.
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            self._writer.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Everything logged so far reaches the disk."""
        if self._enabled:
            self._writer.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            with heard_or_not(sys.stderr):
                self._bar.close()
            self._bar = None
        if self._enabled:
            self._writer.close()
            self._metrics.close()


def finite_or_none(value: float | None) -> float | None:
    """A number as JSON can hold it: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
