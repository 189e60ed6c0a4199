"""What a run tells its user: notes and progress on stderr, scalars and text in the run folder."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

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
        kept = _lines_up_to(folder, step)
        self._metrics = open(folder.metrics, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._metrics.writelines(kept)
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)

    def note(self, line: str) -> None:
        """A line for the user."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._enabled:
            print(line, file=sys.stderr, flush=True)

    def progress(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        """Shows how far the run is."""
        if self._bar is not None:
            speed = "" if tokens_per_second is None else f"{tokens_per_second:,.0f}"
            self._bar.set_postfix({"loss": f"{loss:.4f}", "tokens/s": speed}, refresh=False)
            self._bar.update(step - self._bar.n)

    def step_line(
        self,
        step: int,
        loss: float,
        tokens_per_second: float | None,
        seconds_per_step: float | None,
    ) -> None:
        """The progress as a line, where there is no progress bar."""
        if self._bar is not None:
            return
        parts = [f"step {step}/{self._max_steps}", f"loss {loss:.4f}"]
        if tokens_per_second is not None and seconds_per_step is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
            parts.append(f"{_duration(seconds_per_step * (self._max_steps - step))} left")
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

    def flush(self) -> None:
        """Everything logged so far reaches the disk."""
        if self._enabled:
            self._writer.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._enabled:
            self._writer.close()
            self._metrics.close()


def finite_or_none(value: float | None) -> float | None:
    """A number as JSON can hold it: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def _lines_up_to(folder: RunFolder, step: int) -> list[str]:
    """Lines of the metrics up to `step`; what a killed process has left unfinished is dropped."""
    if not folder.metrics.exists():
        return []
    kept = []
    for line in folder.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            kept.append(line)
    return kept


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
