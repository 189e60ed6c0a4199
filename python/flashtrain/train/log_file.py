"""Files to which the logging thread appends a run's log.

TensorBoard's own writer has a thread, whose errors appear late, or never if a full queue waits for
it. Here, an error is raised at once, no record is left half written, and none is lost.
"""

import contextlib
import io
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class LogFile:
    """A file that grows by whole records. A record that cannot be written waits for the next."""

    def __init__(self, path: Path):
        """Opens or makes the file. Raises OSError where that cannot be done."""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = bytearray()

    def append(self, records: bytes = b"") -> None:
        """Raises OSError where they could not be written; they are tried again with the next."""
        self._waiting += records
        before = os.fstat(self._descriptor).st_size
        rest = memoryview(bytes(self._waiting))
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise
        self._waiting.clear()

    def is_there(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)


class EventFile(LogFile):
    """A new file of TensorBoard's events in a folder.

    Args:
        purge_step: TensorBoard ignores the records of other files in the folder from this step on.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        second, part = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in this order
        super().__init__(folder / f"events.out.tfevents.{second:010d}.{part:09d}.{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        version = "brain.Event:2"
        self._add(
            Event(file_version=version),
            Event(step=purge_step, file_version=version),
            Event(step=purge_step, session_log=start),
        )

    def add(self, summaries: Iterable[Any], step: int | None = None) -> None:
        """Appends protobuf `Summary`s, in one go. Raises OSError as `append` does."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(*(Event(summary=summary, step=step) for summary in summaries))

    def _add(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        self.append(records.getvalue())
