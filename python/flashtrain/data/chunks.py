"""Chunks: the tokens of consecutive pieces of a shard, the unit that is done or not done.

A chunk's file is written beside its place, flushed and renamed, so a file that exists is whole. The
pieces of a chunk depend on the corpus alone, never on the processes that work.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flashtrain import files
from flashtrain.data.corpus import Piece, Shard
from flashtrain.data.token_files import ENDS_DTYPE
from flashtrain.data.tokenizer import Tokenizer

# Of text; about 4 million tokens, which are a few seconds of work for one core.
CHUNK_CHARS = 2**24

_HEADER = np.dtype("<u8")


@dataclasses.dataclass(frozen=True, order=True)
class ChunkId:
    """The place of a chunk in the corpus."""

    split: str
    shard: int
    chunk: int

    def path(self, folder: Path) -> Path:
        return folder / f"{self.split}-{self.shard:06d}-{self.chunk:06d}.chunk"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk's tokens and the document ends in it, counted from its first token."""

    tokens: np.ndarray
    ends: np.ndarray


def texts_of_chunks(shard: Shard, chunk_chars: int) -> Iterator[list[Piece]]:
    """The pieces of a shard, in groups of `chunk_chars` characters or a little more."""
    pieces: list[Piece] = []
    chars = 0
    for piece in shard.pieces():
        pieces.append(piece)
        chars += len(piece.text)
        if chars >= chunk_chars:
            yield pieces
            pieces, chars = [], 0
    if pieces:
        yield pieces


def encode(
    pieces: list[Piece], tokenizer: Tokenizer, end_of_text: int | None, dtype: np.dtype
) -> Chunk:
    """The tokens of pieces; `end_of_text` follows each document, unless it is None."""
    arrays = []
    ends = []
    length = 0
    for piece in pieces:
        arrays.append(tokenizer.encode_to_array(piece.text).astype(dtype))
        length += len(arrays[-1])
        if piece.ends_document:
            if end_of_text is not None:
                arrays.append(np.array([end_of_text], dtype))
                length += 1
            ends.append(length)
    return Chunk(np.concatenate(arrays), np.array(ends, ENDS_DTYPE))


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Writes a chunk, all of it or nothing. The file: number of ends, of tokens, ends, tokens."""
    header = np.array([len(chunk.ends), len(chunk.tokens)], _HEADER)
    data = header.tobytes() + chunk.ends.tobytes() + chunk.tokens.tobytes()
    replace_durably(path, data)


def replace_durably(path: Path, data: bytes | memoryview) -> None:
    """Writes a file that has, at any moment, the old content, or none, or the new one."""
    # Not files.write: another run's process, orphaned for a moment, may write the same content.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            files.flush(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def chunk_size(path: Path) -> tuple[int, int]:
    """The numbers of ends and of tokens of a chunk's file."""
    ends, tokens = np.fromfile(path, _HEADER, 2).tolist()
    return ends, tokens


def read_chunk(path: Path, dtype: np.dtype) -> Chunk:
    """A chunk as it was written."""
    num_ends, _ = chunk_size(path)
    start = 2 * _HEADER.itemsize
    ends = np.fromfile(path, ENDS_DTYPE, num_ends, offset=start)
    tokens = np.fromfile(path, dtype, offset=start + ends.nbytes)
    return Chunk(tokens, ends)


def shard_record(folder: Path, split: str, shard: int) -> Path:
    """The file that says how many chunks a shard has; it is there once the shard is read."""
    return folder / f"{split}-{shard:06d}.json"


def missing_chunks(folder: Path, split: str, shard: int) -> bool:
    """Whether a shard has been read only in part, or not all of its chunks are done."""
    try:
        count = json.loads(shard_record(folder, split, shard).read_text())["chunks"]
    except FileNotFoundError:
        return True
    return not all(ChunkId(split, shard, i).path(folder).exists() for i in range(count))


def forget_shard(folder: Path, split: str, shard: int) -> None:
    """Removes the chunks of a shard whose text has changed."""
    shard_record(folder, split, shard).unlink(missing_ok=True)
    for path in folder.glob(f"{split}-{shard:06d}-*.chunk"):
        path.unlink(missing_ok=True)


def list_chunks(folder: Path, split: str, num_shards: int) -> Iterator[ChunkId]:
    """All chunks of a split that is done, in the order of its text."""
    for shard in range(num_shards):
        record = json.loads(shard_record(folder, split, shard).read_text())
        yield from itertools.starmap(
            ChunkId, ((split, shard, chunk) for chunk in range(record["chunks"]))
        )
