"""The folder of a run: chosen, made, locked and never shared.

<workdir>/checkpoints/     see checkpoint.py
<workdir>/tensorboard/     event files
<workdir>/metrics.jsonl    the same scalars, one JSON object a line
<workdir>/summary.json     the outcome, when the run has ended
"""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from flashtrain import files
from flashtrain.errors import UserError

# How long to wait for the lock of a run that was just killed and whose processes are still dying.
_LOCK_WAIT_SECONDS = 10.0


def default_workdir(config_name: str) -> Path:
    """`runs/<config>/<time>` under the current folder, a name that is free."""
    base = _runs_of(config_name) / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 2
    while os.path.lexists(path):
        path, number = Path(f"{base}-{number}"), number + 1
    return path


def newest_workdir(config_name: str) -> Path:
    """The last of the default folders of a config's runs. Raises UserError if there is none."""
    runs = _runs_of(config_name)
    found = [path.parent for path in runs.glob("*/checkpoints") if path.is_dir()]
    if not found:
        raise UserError(
            f"--resume: there is no run with checkpoints in {runs.absolute()}; name its folder "
            "with --workdir, or leave --resume out to start one"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _runs_of(config_name: str) -> Path:
    return Path("runs", re.sub(r"[^\w.=-]+", "-", config_name))


class RunFolder:
    """The folder of a run's files. Only rank 0 may `open` it and write."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self._lock_file: IO[str] | None = None

    def check_writable(self) -> None:
        """Raises UserError where `open` is bound to fail; makes nothing."""
        try:
            parent = self.path
            while not os.path.lexists(parent):
                parent = parent.parent
            if not parent.is_dir():
                what = "a link to nothing" if parent.is_symlink() else "a file"
                raise self._not_writable(f"{parent} is {what}")
            if os.statvfs(parent).f_flag & os.ST_RDONLY:
                raise self._not_writable("the file system is read-only")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise self._not_writable(f"no permission to write in {parent}")
        except OSError as error:
            raise self._not_writable(files.cause(error)) from error

    def open(self) -> None:
        """Makes the folder and holds it until it is closed, or this process ends.

        Raises:
            UserError: it cannot be made or written, or another process trains in it.
        """
        try:
            self.close()
            self.path.mkdir(parents=True, exist_ok=True)
            # "a+" leaves the holder's number in place for the message below.
            self._lock_file = open(self._lock_path, "a+", encoding="utf-8")  # noqa: SIM115
            self._lock(self._lock_file)
        except OSError as error:
            raise self._not_writable(files.cause(error)) from error

    def close(self) -> None:
        """Releases the folder."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def was_removed(self) -> bool:
        """Whether somebody has removed the folder since it was opened."""
        return not os.path.lexists(self._lock_path)

    def check_shared(self, rank: int) -> None:
        """After rank 0's `open`: raises UserError where another rank does not see the folder."""
        if self.was_removed():
            raise UserError(
                f"rank {rank} does not see the run folder {self.path} that rank 0 has made; choose "
                "one on a file system that all nodes share, with --workdir"
            )

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a run that has ended here, if there is one."""
        try:
            files.check_regular(self.summary)
            found = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces the summary in one go. Raises UserError where it cannot be written."""
        self._replace(self.summary, json.dumps(summary, indent=2) + "\n")

    def drop_metrics_after(self, step: int, again: Sequence[str] = ()) -> None:
        """Removes from the metrics, in one go, what an earlier process logged after `step`, and
        what it left unfinished when it was killed.

        Args:
            again: prefixes of scalars; lines of `step` itself with such a scalar are removed too.

        Raises:
            UserError: the file cannot be read or replaced.
        """
        try:
            files.check_regular(self.metrics)
            found = self.metrics.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            reason = files.cause(error) if isinstance(error, OSError) else error
            raise UserError(
                f"cannot read {self.metrics}, to which the run would add: {reason}; move it away"
            ) from error
        kept = "".join(
            line for line in found.splitlines(keepends=True) if _is_kept(line, step, tuple(again))
        )
        if kept != found:
            self._replace(self.metrics, kept)

    @property
    def _lock_path(self) -> Path:
        return self.path / ".lock"

    def _not_writable(self, reason: str) -> UserError:
        return UserError(
            f"cannot write to the run folder {self.path}: {reason}; choose another with --workdir"
        )

    def _replace(self, path: Path, text: str) -> None:
        try:
            files.write(path, text.encode())
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {files.cause(error)}; checkpoints are untouched: start "
                "again with the same --workdir to go on"
            ) from error

    def _lock(self, file: IO[str]) -> None:
        give_up = time.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            try:
                files.lock(file)  # or not, where there are none: the user answers for it
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    file.seek(0)
                    raise UserError(
                        f"process {file.read().strip()} is training in {self.path}; "
                        "wait for it or choose another --workdir"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()


def _is_kept(line: str, step: int, again: tuple[str, ...]) -> bool:
    """Whether a line of the metrics is whole and was logged for good."""
    try:
        entry = json.loads(line) if line.endswith("\n") else {}
        of_step = entry["step"] == step
        return entry["step"] < step or (
            of_step and not any(name.startswith(again) for name in entry)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
