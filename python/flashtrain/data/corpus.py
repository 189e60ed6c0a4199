"""Text to tokenize: splits of shards, each of which one process reads from beginning to end.

A shard yields pieces of text in an order that never changes, so a preparation that was killed finds
its place again.
"""

import codecs
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from flashtrain.data.compressed import BLOCK_BYTES, open_binary
from flashtrain.data.errors import DataError, missing_package
from flashtrain.data.pieces import cut

_TEXT_TYPES = (
    "string",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "null",
)
_PARQUET_ROWS = 256  # of a batch: rows may be long
_MAX_LINE_BYTES = 2**30  # in memory as a whole
_BOM = codecs.BOM_UTF8
# The first bytes of files that are not of the kind that their names say.
_OTHERS = {
    codecs.BOM_UTF16_LE: "is UTF-16 or UTF-32, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "is UTF-16, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "is compressed by gzip, but its name does not end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd, but its name does not end in .zst",
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text to encode by itself; `ends_document` marks the last piece of a document."""

    text: str
    ends_document: bool


class Shard(Protocol):
    """A part of a split, small enough in number to be listed and large enough to be worth it.

    Attributes:
        files: the files that hold the text of this shard alone; none where the text is not in
            files, or where they are not known.
    """

    @property
    def files(self) -> tuple[Path, ...]: ...

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

    files: tuple[Path, ...]

    def pieces(self) -> Iterator[Piece]:
        for path in self.files:
            yield from document(_decode(path))


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A file of JSON objects, one per line, whose `field` is a document; *.gz, *.zst too.

    If a key occurs twice in an object, the last one counts.
    """

    path: Path
    field: str

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def pieces(self) -> Iterator[Piece]:
        with open_binary(self.path) as file:
            for number, line in enumerate(_lines(self.path, file), start=1):
                if line.strip():
                    yield from document([self._text(line, number)])

    def _text(self, line: bytes, number: int) -> str:
        where = f"{self.path}, line {number:,}"
        if number == 1:
            _check_encoding(self.path, line)
        try:
            # Not int: it refuses numbers of thousands of digits.
            row = json.loads(line.removeprefix(_BOM).decode(), parse_int=float)
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            raise DataError(f"{where} is not UTF-8 (byte {bad:#04x})") from None
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from None
        except RecursionError:
            raise DataError(f"{where} is nested too deeply; leave it out") from None
        text = row.get(self.field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(row) if isinstance(row, dict) else "none, it is no object"
            raise DataError(
                f"{where} has no text in field {self.field!r}; its fields: {fields:.300}"
            )
        return text


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_MAX_LINE_BYTES):
        if len(line) == _MAX_LINE_BYTES:
            raise DataError(f"{path} has a line of more than {_MAX_LINE_BYTES:,} bytes; cut it")
        yield line


@dataclasses.dataclass(frozen=True)
class Parquet:
    """A Parquet file whose `column` holds documents: strings, or the bytes of UTF-8."""

    path: Path
    column: str

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def pieces(self) -> Iterator[Piece]:
        try:
            import pyarrow.parquet  # the processes that tokenize need none
        except ImportError as error:
            raise missing_package("pyarrow", error) from error
        number = 0
        try:
            with open_binary(self.path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
                self._check_column(pyarrow, file.schema_arrow)
                for batch in file.iter_batches(_PARQUET_ROWS, columns=[self.column]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        if isinstance(text, bytes):
                            text = text.decode()
                        yield from document([text or ""])
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            raise DataError(
                f"{self.path}, column {self.column!r}, near row {number:,}: text that is not UTF-8"
                f" (byte {bad:#04x})"
            ) from None
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk
            raise DataError(f"{self.path} is not a whole Parquet file: {error}") from error

    def _check_column(self, pyarrow: Any, schema: Any) -> None:
        columns = {field.name: field.type for field in schema}
        kind = columns.get(self.column)
        if kind is not None and pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) not in _TEXT_TYPES:
            shown = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise DataError(
                f"{self.path} has no column {self.column!r} of strings; it has: {shown:.1000}"
            )


@dataclasses.dataclass(frozen=True)
class HubSplit:
    """One shard of a dataset that the package `datasets` streams, from the hub or a local folder.

    Attributes:
        name, config, split: as for datasets.load_dataset.
        column: holds a document in each row.
        index, num_shards: this shard among those that `datasets` distinguishes.
        rows_are_documents: if False, the shard is one document, whose rows are encoded one by one.
        revision: of the dataset, where it is known.
    """

    name: str
    config: str | None
    split: str
    column: str
    index: int
    num_shards: int
    rows_are_documents: bool = True
    revision: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return ()  # only `datasets` distinguishes a local folder's

    def pieces(self) -> Iterator[Piece]:
        if self.rows_are_documents:
            for text in self._texts():
                yield from document([text])
            return
        for text in self._texts():
            for piece in cut([text]):
                yield Piece(piece, False)
        yield Piece("", True)

    def _texts(self) -> Iterator[str]:
        from flashtrain.data import hub

        rows = hub.stream(
            self.name, self.config, self.split, self.num_shards, self.index, self.revision
        )
        for number, row in enumerate(rows, start=1):
            text = row.get(self.column)
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"dataset {self.name!r}, split {self.split!r}, row {number:,} of shard"
                    f" {self.index}: column {self.column!r} holds {text!r:.80}, no text"
                )
            yield text or ""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents in memory."""

    documents: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def pieces(self) -> Iterator[Piece]:
        for text in self.documents:
            yield from document([text])


def _check_encoding(path: Path, start: bytes) -> None:
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise DataError(f"{path} {what}")


def _decode(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks; a byte order mark at its start is dropped."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # in the (decompressed) file, of the bytes that are not decoded yet
    with open_binary(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            if not offset:
                _check_encoding(path, block)
            text = block.removeprefix(_BOM) if not offset else block
            offset += len(block) - len(text)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(text, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset"
                    f" {offset - pending + error.start:,}; convert it (iconv -t UTF-8) or leave it"
                    " out"
                ) from None
            offset += len(text)
            if not block:
                return
