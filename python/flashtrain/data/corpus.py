"""Text to tokenise: splits of shards, each of which a process reads from its beginning to its end.

A shard yields pieces of text in an order that never changes, so that a preparation that was killed
finds its place again.
"""

import codecs
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from flashtrain.data.compressed import BLOCK_BYTES, open_binary
from flashtrain.data.errors import DataError, missing_package
from flashtrain.data.pieces import cut

_PARQUET_ROWS = 256  # of a batch: rows may be long


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text to encode by itself; `ends_document` marks the last piece of a document."""

    text: str
    ends_document: bool


class Shard(Protocol):
    """A part of a split, small enough in number to be listed and large enough to be worth it."""

    def pieces(self) -> Iterator[Piece]:
        """Raises DataError or OSError where the shard cannot be read."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All shards of a dataset.

    Attributes:
        splits: by name; where "val" is missing, documents of "train" are held out for it.
        end_of_text: follow each document by the tokenizer's end-of-text token.
    """

    splits: dict[str, tuple[Shard, ...]]
    end_of_text: bool = True


def document(blocks: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document; none if it is empty."""
    previous = None
    for text in cut(blocks):
        if previous is not None:
            yield Piece(previous, False)
        previous = text
    if previous is not None:
        yield Piece(previous, True)


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """UTF-8 files, each one document, read in blocks; *.gz and *.zst are decompressed."""

    paths: tuple[Path, ...]

    def pieces(self) -> Iterator[Piece]:
        for path in self.paths:
            yield from document(_decode(path))


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A file of JSON objects, one a line, whose `field` is a document; *.gz, *.zst too."""

    path: Path
    field: str

    def pieces(self) -> Iterator[Piece]:
        with open_binary(self.path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield from document([self._text(line, number)])

    def _text(self, line: bytes, number: int) -> str:
        where = f"{self.path}, line {number:,}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 (byte {line[error.start]:#04x})") from None
        except ValueError as error:  # RecursionError aside, all that json.loads raises
            raise DataError(f"{where} is not JSON: {error}") from None
        text = row.get(self.field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(row) if isinstance(row, dict) else "none, it is no object"
            raise DataError(f"{where} has no text in field {self.field!r}; its fields: {fields}")
        return text


@dataclasses.dataclass(frozen=True)
class Parquet:
    """A Parquet file whose `column` holds documents."""

    path: Path
    column: str

    def pieces(self) -> Iterator[Piece]:
        try:
            import pyarrow.parquet  # the processes that tokenise need none
        except ImportError as error:
            raise missing_package("pyarrow", error) from error
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                columns = {field.name: field.type for field in file.schema_arrow}
                if str(columns.get(self.column)) not in ("string", "large_string", "string_view"):
                    shown = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                    raise DataError(
                        f"{self.path} has no column {self.column!r} of strings; it has: {shown}"
                    )
                for batch in file.iter_batches(_PARQUET_ROWS, columns=[self.column]):
                    for text in batch.column(0).to_pylist():
                        yield from document([text or ""])
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path} is not a whole Parquet file: {error}") from error


@dataclasses.dataclass(frozen=True)
class HubSplit:
    """One shard of a dataset that the package `datasets` streams, from the hub or a local folder.

    Attributes:
        name, config, split: as for datasets.load_dataset.
        column: holds a document in each row.
        index, num_shards: this one among those that `datasets` tells apart.
        rows_are_documents: else the shard is one document, whose rows are encoded one by one.
    """

    name: str
    config: str | None
    split: str
    column: str
    index: int
    num_shards: int
    rows_are_documents: bool = True

    def pieces(self) -> Iterator[Piece]:
        from flashtrain.data import hub

        rows = hub.stream(self.name, self.config, self.split, self.num_shards, self.index)
        texts = (row[self.column] or "" for row in rows)
        if self.rows_are_documents:
            for text in texts:
                yield from document([text])
            return
        for text in texts:
            for piece in cut([text]):
                yield Piece(piece, False)
        yield Piece("", True)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents in memory."""

    documents: tuple[str, ...]

    def pieces(self) -> Iterator[Piece]:
        for text in self.documents:
            yield from document([text])


def _decode(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # in the (decompressed) file, of what the decoder has not taken yet
    with open_binary(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset"
                    f" {offset - pending + error.start:,}; convert it (iconv -t UTF-8) or leave it"
                    " out"
                ) from None
            offset += len(block)
            if not block:
                return
