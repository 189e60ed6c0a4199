"""The folder of a run: chosen, made, locked and never shared.

<workdir>/checkpoints/     see checkpoint.py
<workdir>/tensorboard/     event files
<workdir>/metrics.jsonl    the same scalars, one JSON object a line
<workdir>/summary.json     the outcome, when the run has ended
"""

import fcntl
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from flashtrain.errors import UserError

# How long to wait for the lock of a run that was just killed and whose processes are still dying.
_LOCK_WAIT_SECONDS = 10.0


def default_workdir(config_name: str) -> Path:
    """`runs/<config>/<time>` under the current folder, a name nobody has taken."""
    base = _runs_of(config_name) / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 2
    while path.exists():
        path, number = Path(f"{base}-{number}"), number + 1
    return path


def newest_workdir(config_name: str) -> Path:
    """The last of the default folders of a config's runs. Raises UserError if there is none."""
    runs = _runs_of(config_name)
    found = [path.parent for path in runs.glob("*/checkpoints")]
    if not found:
        raise UserError(
            f"--resume: there is no run with checkpoints in {runs.absolute()}; name its folder "
            "with --workdir, or leave --resume out to start one"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _runs_of(config_name: str) -> Path:
    return Path("runs", re.sub(r"[^\w.=-]+", "-", config_name))


class RunFolder:
    """Where a run's files lie. Only rank 0 may `open` it and write."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"

    def check_writable(self) -> None:
        """Raises UserError where `open` is bound to fail; makes nothing."""
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise self._not_writable(f"{parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise self._not_writable(f"no permission to write in {parent}")

    def open(self) -> None:
        """Makes the folder and holds it until this process ends.

        Raises:
            UserError: it cannot be made or written, or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # "a+" leaves the holder's number in place for the message below.
            self._lock_file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise self._not_writable(error.strerror) from error
        self._lock()

    def check_shared(self, rank: int) -> None:
        """After rank 0's `open`: raises UserError where another rank does not see the folder."""
        if not (self.path / ".lock").exists():
            raise UserError(
                f"rank {rank} does not see the run folder {self.path} that rank 0 has made; choose "
                "one on a file system that all nodes share, with --workdir"
            )

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a run that has ended here, if there is one."""
        try:
            return json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replaces the summary in one go."""
        _replace(self.summary, json.dumps(summary, indent=2) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Removes from the metrics, in one go, what an earlier process logged after `step`, and
        what it left unfinished when it was killed."""
        if not self.metrics.exists():
            return
        found = self.metrics.read_text(encoding="utf-8", errors="replace")
        kept = "".join(line for line in found.splitlines(keepends=True) if _is_up_to(line, step))
        if kept != found:
            _replace(self.metrics, kept)

    def _not_writable(self, reason: str | None) -> UserError:
        return UserError(
            f"cannot write to the run folder {self.path}: {reason}; choose another with --workdir"
        )

    def _lock(self) -> None:
        give_up = time.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    self._lock_file.seek(0)
                    raise UserError(
                        f"process {self._lock_file.read().strip()} is training in {self.path}; "
                        "wait for it or choose another --workdir"
                    ) from None
                time.sleep(0.1)
            except OSError:
                return  # a file system without locks; the user answers for it
        self._lock_file.truncate(0)
        self._lock_file.write(f"{os.getpid()}\n")
        self._lock_file.flush()


def _is_up_to(line: str, step: int) -> bool:
    """Whether a line of the metrics is whole and of no later step."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _replace(path: Path, text: str) -> None:
    """Writes a file; killed at any moment, this leaves the one before or the new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
