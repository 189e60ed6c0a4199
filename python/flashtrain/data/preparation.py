"""Prepares a dataset: from a source's text to a folder of tokens that training reads.

    <folder>                     the prepared data; appears when it is whole
    .<folder>.partial/           what is done so far; a run that was killed goes on from it
    .<folder>.lock               held by the run that prepares; others wait for it

The bytes of the folder depend on the text and the tokenizer alone, not on the number of processes
or on how often the preparation was interrupted.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from flashtrain.data.assemble import assemble, has_begun
from flashtrain.data.chunks import CHUNK_CHARS, replace_durably
from flashtrain.data.corpus import Corpus
from flashtrain.data.errors import DataError
from flashtrain.data.token_files import (
    DTYPES,
    MANIFEST,
    Manifest,
    dtype_for,
    fsync_folder,
    read_manifest,
    write_durably,
)
from flashtrain.data.tokenizer import Tokenizer, get_tokenizer
from flashtrain.data.workers import Done, Work, cannot_write, tokenize

_PROGRESS_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.5


class Source(Protocol):
    """Where a dataset's text comes from.

    Attributes:
        dataset: its name or description, as the user gave it.
        tokenizer: name for `get_tokenizer`.
    """

    @property
    def dataset(self) -> str: ...

    @property
    def tokenizer(self) -> str: ...

    def description(self) -> dict[str, Any]:
        """What the manifest records of the text; cheap to ask for, and without a network."""
        ...

    def corpus(self) -> Corpus:
        """The text."""
        ...


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a preparation did; the fields of the program's last line."""

    documents: int
    tokens: int
    seconds: float
    tokens_per_second_per_core: float | None  # of this run; None where all was done before
    manifest: str


def prepare_source(
    source: Source, folder: Path, *, workers: int = 0, chunk_chars: int = CHUNK_CHARS
) -> Summary:
    """Prepares `folder` unless it is prepared; may be called by any number of processes at once.

    Args:
        folder: of the prepared data.
        workers: processes that tokenise; 0: one for each core.
        chunk_chars: characters of text after which work is saved.

    Raises:
        DataError: the text cannot be read or the folder not written, or it holds something else.
    """
    began = time.perf_counter()
    workers = workers or len(os.sched_getaffinity(0))
    tokenizer = get_tokenizer(source.tokenizer)
    done = Done()
    if not _is_prepared(folder, source, tokenizer):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if not _is_prepared(folder, source, tokenizer):
                    done = _prepare(source, tokenizer, folder, workers, chunk_chars)
                shutil.rmtree(_partial(folder), ignore_errors=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
    elif _partial(folder).exists():
        _remove_partial(folder)
    seconds = time.perf_counter() - began
    return summarize(folder, seconds, done.tokens / seconds / workers if done.tokens else None)


def summarize(folder: Path, seconds: float, speed: float | None) -> Summary:
    """What a folder holds, and how it came to be."""
    splits = read_manifest(folder).splits.values()
    return Summary(
        documents=sum(s.documents.count for s in splits if s.documents),
        tokens=sum(s.tokens for s in splits),
        seconds=round(seconds, 3),
        tokens_per_second_per_core=None if speed is None else round(speed),
        manifest=str(folder / MANIFEST),
    )


def _is_prepared(folder: Path, source: Source, tokenizer: Tokenizer) -> bool:
    """Whether the folder holds this source's data. Raises DataError where it holds another's."""
    if not folder.exists():
        return False
    manifest = read_manifest(folder)
    if "dataset" not in manifest.source and manifest.source.get("name", source.dataset) == (
        source.dataset
    ):
        return True  # made by other means and put here by the user
    same_text = manifest.source.get("dataset") == source.dataset
    if same_text:
        # The text may be gone by now; where it is there, it must be the same.
        with contextlib.suppress(DataError):
            same_text = manifest.source == source.description()
    if same_text and manifest.tokenizer_sha256 == tokenizer.sha256:
        return True
    held = manifest.source.get("dataset") or manifest.source.get("name") or "other data"
    raise DataError(
        f"{folder} holds {held!r}, tokenizer {manifest.tokenizer}"
        + (", of files that were others or have changed since" if held == source.dataset else "")
        + "; choose another folder with --out, or delete it to prepare it again"
    )


def _prepare(
    source: Source, tokenizer: Tokenizer, folder: Path, workers: int, chunk_chars: int
) -> Done:
    partial = _partial(folder)
    _enter(partial, source, tokenizer, chunk_chars)
    chunks, out = partial / "chunks", partial / "out"
    for path in (chunks, out):
        path.mkdir(exist_ok=True)
    for unfinished in chunks.glob(".*"):  # of processes that were killed
        unfinished.unlink(missing_ok=True)
    corpus = source.corpus()
    progress = _Progress(folder.name)
    done = Done()
    if not has_begun(chunks):
        work = Work(corpus, tokenizer.name, chunks, chunk_chars)
        done = tokenize(work, workers, progress.report)
        progress.end(done)
    dtype = dtype_for(tokenizer.vocab_size)
    splits = assemble(corpus, chunks, out, DTYPES[dtype], workers)
    manifest = Manifest(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        source=source.description(),
        splits=splits,
        tokenizer_sha256=tokenizer.sha256,
    )
    (out / MANIFEST).unlink(missing_ok=True)
    write_durably(out / MANIFEST, manifest.to_json().encode())
    out.rename(folder)
    fsync_folder(folder.parent)
    return done


def _partial(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def _remove_partial(folder: Path) -> None:
    """What a run has left that was killed after the folder was done, where it can be removed."""
    with contextlib.suppress(OSError), _locked(folder):
        if folder.exists():
            shutil.rmtree(_partial(folder))


def _enter(partial: Path, source: Source, tokenizer: Tokenizer, chunk_chars: int) -> None:
    """Begins, or takes up what an earlier run has left of the same preparation."""
    job = {
        "chunk_chars": chunk_chars,
        "source": source.description(),
        "tokenizer_sha256": tokenizer.sha256,
    }
    path = partial / "job.json"
    if partial.exists() and not (path.exists() and (partial / "out").exists()):
        # Nothing is done yet, or what was done is being removed: a run was killed while it did so,
        # or after it ended, and its result has been taken away since.
        shutil.rmtree(partial)
    if path.exists():
        if json.loads(path.read_text()) == job:
            return
        if any(partial.glob("chunks/*.chunk")) or has_begun(partial / "chunks"):
            raise DataError(
                f"{partial} holds the beginnings of another preparation (other text or settings);"
                " delete it, or choose another folder with --out"
            )
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    replace_durably(path, json.dumps(job).encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of the folder; the system releases it however this process ends."""
    with (folder.parent / f".{folder.name}.lock").open("ab") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    _say(f"{folder.name}: another process prepares it; waiting")
                waiting = True
                time.sleep(_LOCK_POLL_SECONDS)
        yield


class _Progress:
    """A line on stderr every now and then."""

    def __init__(self, name: str):
        self._name = name
        self._began = self._spoke = time.perf_counter()
        _say(f"preparing {name}")

    def report(self, done: Done) -> None:
        now = time.perf_counter()
        if now - self._spoke >= _PROGRESS_SECONDS:
            self._spoke = now
            self._line(done)

    def end(self, done: Done) -> None:
        self._line(done)

    def _line(self, done: Done) -> None:
        speed = done.tokens / max(time.perf_counter() - self._began, 1e-9)
        _say(
            f"{self._name}: {done.documents:,} documents, {done.tokens:,} tokens,"
            f" {speed / 1e6:.2f}M tokens/s"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
