"""The record of a preparation, by which a run continues a killed one, or notices changed text.

`<partial>/job.json` holds the settings, a hash of the sizes and times of the text's files, and a
checksum for each shard. Where files have changed, the chunks of their shards are made again.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from flashtrain.data import identity
from flashtrain.data.assemble import has_begun
from flashtrain.data.chunks import forget_shard, replace_durably
from flashtrain.data.corpus import Corpus
from flashtrain.data.errors import DataError
from flashtrain.data.tokenizer import Tokenizer

_JOB = "job.json"
_OURS = ("chunks", "out", _JOB)
# Of text whose checksums need enough time for a line to the user.
_LARGE_BYTES = 2**30


class Source(Protocol):
    """The source of a dataset's text.

    Attributes:
        dataset: its name or description, as the user gave it.
        tokenizer: name for `get_tokenizer`.
    """

    @property
    def dataset(self) -> str: ...

    @property
    def tokenizer(self) -> str: ...

    def description(self) -> dict[str, Any]:
        """How text is read, for the manifest; cheap to compute, without a network.

        Raises:
            DataError: the text is not there.
        """
        ...

    def files(self) -> identity.Files:
        """All local files that hold the text; none where it is elsewhere. Raises DataError."""
        ...

    def revision(self) -> str | None:
        """The current commit of a remote dataset; None: not known."""
        ...

    def corpus(self, revision: str | None = None) -> Corpus:
        """The text, of that revision."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """A preparation that has begun.

    Attributes:
        settings: all but the text's content that decides the chunks.
        look: of the text's files, see `identity.look`.
        text: what the manifest says of the text's content.
        shards: by split, a checksum of each shard's text.
    """

    settings: dict[str, Any]
    look: str
    text: dict[str, Any]
    shards: dict[str, list[str]]


def enter(
    partial: Path,
    source: Source,
    tokenizer: Tokenizer,
    chunk_chars: int,
    say: Callable[[str], None],
) -> tuple[Job, Corpus]:
    """Begins a preparation, or continues that of an earlier run.

    Raises:
        DataError: the text cannot be read, or what is there is of another preparation.
        OSError: `partial` cannot be written.
    """
    before = _read(partial)
    files = source.files()
    settings: dict[str, Any] = {
        "chunk_chars": chunk_chars,
        "tokenizer_sha256": tokenizer.sha256,
        "reading": source.description(),
        "dataset": None if files else source.dataset,
    }
    look = identity.look(files)
    if before is not None and before.settings != settings:
        if has_begun(partial / "chunks") or any(partial.glob("chunks/*.chunk")):
            raise DataError(
                f"{partial} holds the beginnings of another preparation (other text or settings);"
                " choose another folder with --out, or move it away"
            )
        before = None
    if before is None:
        discard(partial)
    for folder in (partial, partial / "chunks", partial / "out"):
        folder.mkdir(exist_ok=True)
    if before is not None and files and before.look == look:
        return before, source.corpus()
    if files:
        job, corpus = _of_files(settings, look, files, source, say)
    else:
        revision = before.text.get("revision") if before else source.revision()
        job = Job(settings, look, {"revision": revision} if revision else {}, {})
        corpus = source.corpus(revision)
    if before is not None:
        _forget_changes(partial, before, job)
    replace_durably(partial / _JOB, json.dumps(dataclasses.asdict(job)).encode())
    return job, corpus


def _of_files(
    settings: dict[str, Any],
    look: str,
    files: identity.Files,
    source: Source,
    say: Callable[[str], None],
) -> tuple[Job, Corpus]:
    content = read_content(files, say)
    corpus = source.corpus()
    shards = {
        split: [
            identity.joint_checksum(shard.files, content)
            if shard.files
            else content.description["sha256"]
            for shard in of_split
        ]
        for split, of_split in corpus.splits.items()
    }
    return Job(settings, look, content.description, shards), corpus


def read_content(files: identity.Files, say: Callable[[str], None]) -> identity.Content:
    """`identity.read`, with a line where it needs time."""
    size = identity.total_bytes(files)
    if size >= _LARGE_BYTES:
        say(f"computing checksums of {size / 1e9:.1f} GB of text")
    return identity.read(files)


def _forget_changes(partial: Path, before: Job, job: Job) -> None:
    """Removes the chunks of shards whose text has changed."""
    for split in before.shards:
        now = job.shards.get(split, [])
        changed = [
            shard
            for shard, checksum in enumerate(before.shards[split])
            if shard >= len(now) or now[shard] != checksum
        ]
        if changed and has_begun(partial / "chunks"):
            raise DataError(
                f"{partial} holds tokens of text that has changed since; choose another folder with"
                " --out, or move it away"
            )
        for shard in changed:
            forget_shard(partial / "chunks", split, shard)


def _read(partial: Path) -> Job | None:
    """The job of an earlier run; None: there is none, or the run was removing all of it."""
    path = partial / _JOB
    if not (path.exists() and (partial / "out").exists()):
        return None
    try:
        return Job(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        return Job({}, "", {}, {})  # of another version


def discard(partial: Path) -> None:
    """Removes the files of a run, in an order in which no later run continues from the rest.

    Raises:
        DataError: it holds something else.
    """
    if not partial.exists():
        return
    strangers = [p.name for p in partial.iterdir() if p.name not in _OURS and p.name[:1] != "."]
    if strangers:
        raise DataError(
            f"{partial} is where data is prepared, but holds {strangers[0]!r}; move that away"
        )
    (partial / _JOB).unlink(missing_ok=True)
    shutil.rmtree(partial)
