"""The processes that read and tokenize a corpus: readers cut shards into chunks of text, encoders
turn them into chunk files.

Reading needs a few percent of the time of encoding, so few readers keep all encoders busy. A
chunk's text waits in a short queue: memory does not grow with the corpus.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import queue
import signal
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from flashtrain.data.chunks import (
    ChunkId,
    encode,
    missing_chunks,
    replace_durably,
    shard_record,
    texts_of_chunks,
    write_chunk,
)
from flashtrain.data.corpus import Corpus
from flashtrain.data.errors import DataError, cannot_read, cannot_write
from flashtrain.data.manifest import DTYPES
from flashtrain.data.token_files import dtype_for
from flashtrain.data.tokenizer import get_tokenizer

# A reader serves this many encoders: it parses JSON and hands text on at over 150 MB/s, an encoder
# processes 5 to 15 MB/s.
ENCODERS_PER_READER = 8
_POLL_SECONDS = 1.0
# Of 107: the rest is for the folder and the file that multiprocessing makes within.
_SOCKET_FOLDER_BYTES = 107 - len("/pymp-12345678/listener-12345678")


@dataclasses.dataclass(frozen=True)
class Work:
    """The work, as every process gets it."""

    corpus: Corpus
    tokenizer: str
    folder: Path  # of the chunks
    chunk_chars: int


@dataclasses.dataclass
class Done:
    """The numbers that this run has tokenized so far."""

    documents: int = 0
    tokens: int = 0
    chars: int = 0

    def add(self, more: "Done") -> None:
        self.documents += more.documents
        self.tokens += more.tokens
        self.chars += more.chars


def context() -> Any:
    """Processes forked from a helper without threads, whatever threads this process has.

    Raises:
        DataError: this machine or environment cannot have any.
    """
    try:
        os.getcwd()  # which new processes enter
    except FileNotFoundError:
        raise DataError("the folder you are in has been deleted; change to another") from None
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload([__name__])
    # The helpers ignore all that a terminal or a job sends but this; they inherit the mask.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        _shorten_socket_paths()
        resource_tracker.ensure_running()
        multiprocessing.forkserver.ensure_running()
    except OSError as error:
        raise cannot_start(error) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return forkserver


def _shorten_socket_paths() -> None:
    """The helper listens on a socket in the temporary folder, whose path has 107 bytes at most."""
    if len(os.fsencode(tempfile.gettempdir())) <= _SOCKET_FOLDER_BYTES:
        return
    usual = tempfile.tempdir
    for short in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.access(short, os.W_OK | os.X_OK):
            tempfile.tempdir = short
            try:
                multiprocessing.util.get_temp_dir()  # made once, for all sockets of this process
            finally:
                tempfile.tempdir = usual
            return
    raise DataError(
        f"cannot start processes: the path {tempfile.gettempdir()} is too long for a socket in it;"
        " set TMPDIR to a shorter one"
    )


def cannot_start(error: OSError) -> DataError:
    """The error of a machine or an environment that has no room for processes."""
    reason = error.strerror or str(error)
    return DataError(f"cannot start processes: {reason}; --workers=<n> starts fewer of them")


def die_with_parent() -> None:
    """Called first in a process: it is not to outlive the one that asked for it.

    The kernel's parent of a forked process is the helper that forked it, which lives as long as
    any of them; so a thread waits for the end of the pipe that the asking process holds.
    """
    for number in (signal.SIGINT, signal.SIGHUP):  # from the terminal: for the parent alone
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_die() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_and_die, daemon=True).start()


def tokenize(work: Work, num_encoders: int, progress: Callable[[Done], None]) -> Done:
    """Writes every chunk that is not there yet.

    Raises:
        DataError: a shard cannot be read, a chunk not written, or a process was killed.
    """
    shards = [
        (split, index)
        for split, of_split in work.corpus.splits.items()
        for index in range(len(of_split))
        if missing_chunks(work.folder, split, index)
    ]
    done = Done()
    if not shards:
        return done
    num_readers = min(len(shards), -(-num_encoders // ENCODERS_PER_READER))
    team = _Team()
    texts = team.context.Queue(num_readers + 1)
    texts.cancel_join_thread()  # after an error nobody may be left to read the queue
    next_shard = team.context.Value("q", 0)
    try:
        for _ in range(num_readers):
            team.start(_read, work, shards, next_shard, texts)
        for _ in range(num_encoders):
            team.start(_encode, work, texts)
        readers, encoders, to_end = num_readers, num_encoders, 0
        while encoders:
            for kind, value in team.messages():
                if kind == "error":
                    raise DataError(value)
                if kind == "chunk":
                    done.add(value)
                elif kind == "read":
                    readers -= 1
                    if not readers:
                        to_end = num_encoders
                elif kind == "encoded":
                    encoders -= 1
            # Never waiting for room: the encoders that would make it may have been killed.
            with contextlib.suppress(queue.Full):
                while to_end:
                    texts.put_nowait(None)
                    to_end -= 1
            progress(done)
    finally:
        team.stop()
    return done


class _Team:
    """Processes that report, and whose death is noticed."""

    def __init__(self) -> None:
        self.context = context()
        self._members: dict[Connection, Any] = {}

    def start(self, role: Callable[..., None], *arguments: Any) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_run, args=(role, theirs, *arguments), daemon=True)
        try:
            process.start()
        except BrokenPipeError:  # it died before it got its work
            raise DataError(_death("was killed as it began")) from None
        except OSError as error:
            raise cannot_start(error) from error
        theirs.close()
        self._members[ours] = process

    def messages(self) -> list[tuple[str, Any]]:
        """The reports that have come within a second."""
        messages: list[tuple[str, Any]] = []
        ready: list[Any] = wait(list(self._members), timeout=_POLL_SECONDS)
        for connection in ready:
            try:
                messages.append(connection.recv())
            except EOFError:
                messages.append(("error", self._last_words(self._members.pop(connection))))
            if messages[-1][0] in ("read", "encoded"):
                self._members.pop(connection).join()
        return messages

    def stop(self) -> None:
        for process in self._members.values():
            process.kill()
        for process in self._members.values():
            process.join()

    def _last_words(self, process: Any) -> str:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return _death(how)


def _death(how: str) -> str:
    return (
        f"a process that prepares the data {how}; the machine may be out of memory"
        " (--workers=<n> takes fewer processes); what is done is kept, run it again to go on"
    )


def _run(role: Callable[..., None], reports: Connection, *arguments: Any) -> None:
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to the whole job: for the parent, too
    try:
        role(reports, *arguments)
    except DataError as error:
        _report(reports, str(error))
    except OSError as error:
        _report(reports, str(cannot_read("the text", error)))
    except MemoryError:
        _report(reports, _death("ran out of memory"))


def _report(reports: Connection, error: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # where the one that asked has been killed
        reports.send(("error", error))


def _read(
    reports: Connection, work: Work, shards: list[tuple[str, int]], next_shard: Any, texts: Any
) -> None:
    """Reads one shard after the other; queues the text of each chunk that is not done."""
    while True:
        with next_shard.get_lock():
            number = next_shard.value
            next_shard.value += 1
        if number >= len(shards):
            break
        split, index = shards[number]
        count = 0
        shard = work.corpus.splits[split][index]
        for count, pieces in enumerate(texts_of_chunks(shard, work.chunk_chars), start=1):
            chunk = ChunkId(split, index, count - 1)
            if not chunk.path(work.folder).exists():
                texts.put((chunk, pieces))
        record = shard_record(work.folder, split, index)
        _write(work.folder, replace_durably, record, b'{"chunks": %d}\n' % count)
    texts.close()
    texts.join_thread()  # until all of it is on its way
    reports.send(("read", None))


def _encode(reports: Connection, work: Work, texts: Any) -> None:
    """Tokenizes chunks until there are no more."""
    tokenizer = get_tokenizer(work.tokenizer)
    dtype = DTYPES[dtype_for(tokenizer.vocab_size)]
    end_of_text = tokenizer.end_of_text if work.corpus.end_of_text else None
    while (item := texts.get()) is not None:
        chunk, pieces = item
        encoded = encode(pieces, tokenizer, end_of_text, dtype)
        _write(work.folder, write_chunk, chunk.path(work.folder), encoded)
        chars = sum(len(piece.text) for piece in pieces)
        reports.send(("chunk", Done(len(encoded.ends), len(encoded.tokens), chars)))
    reports.send(("encoded", None))


def _write(folder: Path, write: Callable[..., None], *arguments: Any) -> None:
    try:
        write(*arguments)
    except OSError as error:
        raise cannot_write(folder, error) from error
