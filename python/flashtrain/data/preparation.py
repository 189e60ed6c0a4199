"""Prepares a dataset: from a source's text to a folder of tokens that training reads.

The bytes of the folder depend on the text and the tokenizer alone, not on the number of processes
or on how often the preparation was interrupted.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashtrain.data import identity
from flashtrain.data.assemble import assemble, has_begun
from flashtrain.data.chunks import CHUNK_CHARS
from flashtrain.data.errors import DataError, TextGoneError, cannot_write
from flashtrain.data.job import Source, discard, enter, read_content
from flashtrain.data.manifest import DTYPES, MANIFEST, Manifest, read_manifest
from flashtrain.data.token_files import dtype_for
from flashtrain.data.tokenizer import Tokenizer, get_tokenizer
from flashtrain.data.workers import Done, Work, tokenize
from flashtrain.data.workplace import check_free, has_manifest, occupied, publish
from flashtrain.files import inside, write

_PROGRESS_SECONDS = 10.0
_ATTEMPTS = 3
# In the prepared folder: how the text's files looked when their checksums were last compared.
LOOK = "source_files.json"


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a preparation; the fields of the program's last line."""

    documents: int
    tokens: int
    seconds: float
    tokens_per_second_per_core: float | None  # of this run; None where all was done before
    manifest: str


def prepare_source(
    source: Source, folder: Path, *, workers: int = 0, chunk_chars: int = CHUNK_CHARS
) -> Summary:
    """Prepares `folder` unless it is prepared; any number of processes may call it at once.

    Args:
        folder: of the prepared data.
        workers: processes that tokenize; 0: one for each core.
        chunk_chars: characters of text after which work is saved.

    Raises:
        DataError: the text cannot be read or the folder not written, or it holds something else.
    """
    began = time.perf_counter()
    workers = workers or len(os.sched_getaffinity(0))
    tokenizer = get_tokenizer(source.tokenizer)
    done = None
    try:
        if not has_manifest(folder):
            check_free(folder)
            source.files()  # a mistake in them is said before anything is made
            with occupied(folder, _sayer(folder)) as partial:
                if not has_manifest(folder):
                    done = _prepare(source, tokenizer, folder, partial, workers, chunk_chars)
                    discard(partial)
        if done is None:
            _check(folder, source, tokenizer)
            _remove_leftovers(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    seconds = time.perf_counter() - began
    tokens = done.tokens if done else 0
    return summarize(folder, seconds, tokens / seconds / workers if tokens else None)


def summarize(folder: Path, seconds: float, speed: float | None) -> Summary:
    """The content of a folder, and the speed of its preparation."""
    splits = read_manifest(folder).splits.values()
    return Summary(
        documents=sum(s.documents.count for s in splits if s.documents),
        tokens=sum(s.tokens for s in splits),
        seconds=round(seconds, 3),
        tokens_per_second_per_core=None if speed is None else round(speed),
        manifest=str(folder / MANIFEST),
    )


def _check(folder: Path, source: Source, tokenizer: Tokenizer) -> None:
    """Raises DataError where the folder holds another source's data, or that of another text."""
    manifest = read_manifest(folder)
    if "dataset" not in manifest.source and manifest.source.get("name", source.dataset) == (
        source.dataset
    ):
        return  # made by other means and put here by the user
    if manifest.tokenizer_sha256 == tokenizer.sha256 and _same_text(
        folder, manifest.source, source
    ):
        return
    held = manifest.source.get("dataset") or manifest.source.get("name") or "other data"
    raise DataError(
        f"{folder} holds {held!r:.200}, tokenizer {manifest.tokenizer}"
        + (", of files that were others or have changed since" if held == source.dataset else "")
        + "; choose another folder with --out, or move this one away to prepare it again"
    )


def _same_text(folder: Path, held: dict[str, Any], source: Source) -> bool:
    """Whether a manifest's source is the text that `source` has now, where it is there."""
    same_name = held.get("dataset") == source.dataset
    try:
        files, reading = source.files(), source.description()
        if "sha256" not in held:  # a remote dataset, or an older folder, which has sizes alone
            known = dict(reading)
            if files and "files" in held:
                known["files"] = sum(map(len, files.values()))
                known["bytes"] = identity.total_bytes(files)
            return same_name and all(held.get(key, value) == value for key, value in known.items())
        if not files:
            return same_name  # prepared data outlives its text
        if any(held.get(key) != value for key, value in reading.items()):
            return False
        return _same_content(folder, held["sha256"], files)
    except TextGoneError:
        return same_name
    except DataError as error:
        if same_name:
            _say(f"{folder.name}: the text it was made of is not compared: {error}")
        return same_name


def _same_content(folder: Path, sha256: Any, files: identity.Files) -> bool:
    if identity.look(files) == _read_look(folder):
        return True
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # prepared data may be read-only
            stack.enter_context(occupied(folder, _sayer(folder)))
        look = identity.look(files)
        if look == _read_look(folder):  # another process has compared them meanwhile
            return True
        content = read_content(files, _sayer(folder))
        same = content.description["sha256"] == sha256
        if same:
            with contextlib.suppress(OSError):
                _write_look(folder, look)
        return bool(same)


def _read_look(folder: Path) -> str | None:
    try:
        path = inside(folder, LOOK)
        with path.open(encoding="utf-8") as file:
            look = json.loads(file.read(2**12))
    except (OSError, ValueError, RecursionError):
        return None
    return look.get("look") if isinstance(look, dict) else None


def _write_look(folder: Path, look: str) -> None:
    write(folder / LOOK, json.dumps({"look": look}).encode() + b"\n")


def _prepare(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    partial: Path,
    workers: int,
    chunk_chars: int,
) -> Done | None:
    """None: another process was first."""
    chunks, out = partial / "chunks", partial / "out"
    progress = _Progress(folder.name)
    done = Done()
    for _ in range(_ATTEMPTS):
        job, corpus = enter(partial, source, tokenizer, chunk_chars, progress.line)
        if not has_begun(chunks):
            for unfinished in chunks.glob(".*"):  # of processes that were killed
                unfinished.unlink(missing_ok=True)
            work = Work(corpus, tokenizer.name, chunks, chunk_chars)
            done.add(tokenize(work, workers, progress.report))
            progress.end(done)
        if identity.look(source.files()) == job.look:
            break
        progress.line("files have changed while they were read; what has changed is read again")
    else:
        raise DataError(f"{source.dataset}: its files change all the time; prepare a copy of them")
    if not (out / MANIFEST).exists():
        dtype = dtype_for(tokenizer.vocab_size)
        manifest = Manifest(
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            dtype=dtype,
            source={"dataset": source.dataset, **source.description(), **job.text},
            splits=assemble(corpus, chunks, out, DTYPES[dtype], workers),
            tokenizer_sha256=tokenizer.sha256,
        )
        if job.shards:
            _write_look(out, job.look)
        write(out / MANIFEST, manifest.to_json().encode())
    if publish(out, folder):
        return done
    if not has_manifest(folder):
        raise DataError(f"another process is writing to {folder}; run this again")
    return None


def _remove_leftovers(folder: Path) -> None:
    """Removes, where it can, the files of a run that was killed after the folder was done."""
    for partial in (folder / ".partial", folder.with_name(f".{folder.name}.partial")):
        if partial.exists():
            with contextlib.suppress(OSError, DataError), occupied(folder, _sayer(folder)):
                discard(partial)


def _sayer(folder: Path) -> Callable[[str], None]:
    return lambda line: _say(f"{folder.name}: {line}")


class _Progress:
    """A line on stderr at intervals."""

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

    def line(self, line: str) -> None:
        _say(f"{self._name}: {line}")

    def _line(self, done: Done) -> None:
        speed = done.tokens / max(time.perf_counter() - self._began, 1e-9)
        _say(
            f"{self._name}: {done.documents:,} documents, {done.tokens:,} tokens,"
            f" {speed / 1e6:.2f}M tokens/s"
        )


def _say(line: str) -> None:
    if sys.stderr is not None:  # else print would write to stdout
        with contextlib.suppress(OSError, ValueError):  # nobody is there to read it
            print(line, file=sys.stderr, flush=True)
