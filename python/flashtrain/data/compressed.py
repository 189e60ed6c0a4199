"""Files of bytes, decompressed on the fly where their name ends in .gz or .zst."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from flashtrain import files
from flashtrain.data.errors import DataError, missing_package

BLOCK_BYTES = 2**20
# Bytes decoded at a time: 4 bytes of zstd may become 128 KiB, so these at most 128 MiB.
_COMPRESSED_BLOCK_BYTES = 2**12


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading.

    Raises:
        DataError: the compressed file is damaged or incomplete (also while it is read), or it is no
            regular file, whose reading may never end.
        OSError: it cannot be read.
    """
    try:
        with contextlib.ExitStack() as stack:
            _check_regular(path)
            file: Any = stack.enter_context(path.open("rb", buffering=BLOCK_BYTES))
            suffix = path.suffix.lower()
            if suffix == ".gz":
                file = io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file)), BLOCK_BYTES)
            elif suffix == ".zst":
                file = io.BufferedReader(_ZstdReader(path, file), BLOCK_BYTES)
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or incomplete: {error}") from error


def _check_regular(path: Path) -> None:
    try:
        files.check_regular(path)
    except ValueError as error:
        raise DataError(str(error)) from None


class _ZstdReader(io.RawIOBase):
    """zstandard's own reader mistakes the end of a truncated file for the end of its data."""

    def __init__(self, path: Path, file: BinaryIO):
        try:
            import zstandard  # here: most files need none
        except ImportError as error:
            raise missing_package("zstandard", error) from error
        self._path = path
        self._file = file
        self._error = zstandard.ZstdError
        # The largest window there is; `zstd --long=31` uses it.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._decoded = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decoded:
            if not self._decode():
                return 0
        size = min(len(buffer), len(self._decoded))
        buffer[:size] = self._decoded[:size]
        self._decoded = self._decoded[size:]
        return size

    def _decode(self) -> bool:
        """Decodes some more; False at the end. A file may hold several frames."""
        ended = self._frame is None or self._frame.eof
        data = (self._frame.unused_data if self._frame is not None and ended else b"") or (
            self._file.read(_COMPRESSED_BLOCK_BYTES)
        )
        if not data:
            if ended:
                return False
            raise DataError(f"{self._path} is incomplete: it ends within a frame")
        if ended:
            self._frame = self._decompressor.decompressobj()
        try:
            self._decoded = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise DataError(f"{self._path} is damaged: {error}") from error
        return True
