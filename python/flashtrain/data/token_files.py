"""Token files: prepared data on disk as it is written and opened, see docs/data_format.md.

A folder of prepared data holds `manifest.json` and for each split a raw little-endian integer file
of tokens and, where the documents are known, one of their ends. It is written beside its final
place and moved there with its manifest last, so a folder with a manifest is whole.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain import files
from flashtrain.data.errors import DataError, cannot_read
from flashtrain.data.manifest import (
    DTYPES,
    MANIFEST,
    Documents,
    Manifest,
    Split,
    read_manifest,
    remedy,
)
from flashtrain.data.workplace import beside, check_free, has_manifest, make_parent, publish

ENDS_DTYPE = np.dtype("<u8")

# Checksums of larger files are not computed at every start: reading 17 GB needs a minute.
VERIFY_AT_LOAD_BYTES = 256 * 2**20

_BLOCK = 2**24  # tokens checked at a time


def write_token_files(
    out_dir: Path,
    splits: Mapping[str, np.ndarray],
    *,
    tokenizer: str,
    vocab_size: int,
    source: dict[str, Any],
    ends: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes prepared data to `out_dir`, all of it or nothing.

    Of several processes that write the same folder at once the first wins; the others drop their
    copy.

    Args:
        out_dir: the folder to create; one that exists is left as it is.
        splits: one-dimensional integer arrays of token ids, at least "train" and "val".
        tokenizer, vocab_size, source: see `Manifest`.
        ends: by split, where its documents end, see `open_documents`; None: not known.

    Raises:
        DataError: the folder cannot be written.
        ValueError: a token is not in 0..vocab_size-1.
    """
    if has_manifest(out_dir):
        return
    check_free(out_dir)
    for name, tokens in splits.items():
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise ValueError(
                f"{name} holds token {outside[0]}, outside the vocabulary of {vocab_size}"
            )
    dtype = dtype_for(vocab_size)
    try:
        make_parent(out_dir)
        remove_abandoned(out_dir)
        with _staging(out_dir) as staging:
            written = {}
            for name, tokens in splits.items():
                data = np.ascontiguousarray(tokens, dtype=DTYPES[dtype]).tobytes()
                files.write(staging / tokens_file(name), data)
                documents = None
                if ends is not None:
                    index = np.ascontiguousarray(ends[name], dtype=ENDS_DTYPE).tobytes()
                    file = documents_file(name)
                    files.write(staging / file, index)
                    documents = Documents(file, len(ends[name]), hashlib.sha256(index).hexdigest())
                digest = hashlib.sha256(data).hexdigest()
                written[name] = Split(tokens_file(name), len(tokens), digest, documents)
            manifest = Manifest(tokenizer, vocab_size, dtype, source, written)
            files.write(staging / MANIFEST, manifest.to_json().encode())
            staging.chmod(0o755)  # mkdtemp's 0o700 would hide the data from other users
            if not publish(staging, out_dir) and not has_manifest(out_dir):
                raise DataError(f"another process is writing to {out_dir}; run this again")
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {out_dir}: {files.cause(error)}; choose another folder"
            " with --out or DATA_DIR"
        ) from error


def remove_abandoned(out_dir: Path) -> None:
    """Removes, where it can, the files of processes that were killed in `write_token_files`.

    On a file system without locks these processes may still be at work, so all of it stays.
    """
    prefix = beside(out_dir, "writing-")
    with contextlib.suppress(OSError):
        for path in list(prefix.parent.iterdir()):
            if path.name.startswith(prefix.name):
                with contextlib.suppress(OSError), _locked(path) as held:
                    if held:
                        shutil.rmtree(path)


@contextlib.contextmanager
def _staging(out_dir: Path) -> Iterator[Path]:
    """A new folder beside `out_dir`, removed in the end unless it was renamed.

    It is locked for as long as its process lives; an abandoned folder is not.
    """
    prefix = beside(out_dir, "writing-")
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_locked(path, wait=True))
            if not path.exists():  # removed before it was locked
                continue
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock of the folder itself; the system releases it however this process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield files.lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def dtype_for(vocab_size: int) -> str:
    """The smallest type of token file, a key of `DTYPES`, that holds the vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokens_file(split: str) -> str:
    """The name of a split's token file."""
    return f"{split}.bin"


def documents_file(split: str) -> str:
    """The name of a split's document index."""
    return f"{split}.documents.bin"


def open_split(folder: Path, manifest: Manifest, name: str, *, verify: bool = False) -> np.ndarray:
    """A read-only memory map of a split's tokens, one-dimensional.

    The size is always checked; its SHA-256 and that all tokens are of the vocabulary, where
    `verify` is set or the file is small.

    Raises:
        DataError: the file is missing, of another size or of other content than the manifest says.
    """
    split, dtype = manifest.splits[name], DTYPES[manifest.dtype]
    tokens, verified = _open(folder, split.file, split.tokens, dtype, split.sha256, verify)
    if verified:
        for begin in range(0, len(tokens), _BLOCK):
            check_tokens(tokens[begin : begin + _BLOCK], manifest, folder / split.file)
    return tokens


def check_tokens(tokens: np.ndarray, manifest: Manifest, file: Path) -> None:
    """Raises DataError where one is outside the vocabulary."""
    largest = int(tokens.max(initial=0))
    if largest >= manifest.vocab_size:
        raise DataError(
            f"{file} holds token {largest:,}, outside its vocabulary of {manifest.vocab_size:,};"
            f" {remedy(file.parent)}"
        )


def open_documents(
    folder: Path, manifest: Manifest, name: str, *, verify: bool = False
) -> np.ndarray | None:
    """A read-only memory map, uint64 [documents], of the ends of a split's documents.

    An end is the number of tokens up to and including the document's last one. None where the
    folder has no index of documents.

    Raises:
        DataError: as for `open_split`, or the last one does not end where the tokens do.
    """
    split = manifest.splits[name]
    if split.documents is None:
        return None
    file, count, sha256 = split.documents.file, split.documents.count, split.documents.sha256
    ends, verified = _open(folder, file, count, ENDS_DTYPE, sha256, verify)
    last = int(ends[-1]) if count else 0
    if last != split.tokens:
        raise DataError(
            f"{folder / file}: its last document ends at {last:,}, not at its {split.tokens:,}"
            f" tokens; {remedy(folder)}"
        )
    for begin in range(0, count if verified else 0, _BLOCK):
        block = ends[begin : begin + _BLOCK + 1]
        if (block[1:] < block[:-1]).any():
            raise DataError(f"{folder / file}: its documents are in no order; {remedy(folder)}")
    return ends


def verify_folder(folder: Path) -> Manifest:
    """Reads every byte of a folder of prepared data, compares the checksums and checks the tokens.

    Raises:
        DataError: a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    for name in manifest.splits:
        open_split(folder, manifest, name, verify=True)
        open_documents(folder, manifest, name, verify=True)
    return manifest


def _open(
    folder: Path, file: str, count: int, dtype: np.dtype, sha256: str, verify: bool
) -> tuple[np.ndarray, bool]:
    """A map of a file and whether its checksum was compared."""
    try:
        path = files.inside(folder, file)
        size, expected = path.stat().st_size, count * dtype.itemsize
        if size != expected:
            raise DataError(
                f"{path} holds {size:,} bytes, the manifest says {expected:,}; {remedy(folder)}"
            )
        if size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype), verify
        verify = verify or size <= VERIFY_AT_LOAD_BYTES
        if verify and sha256_of(path) != sha256:
            raise DataError(
                f"{path} is damaged: its SHA-256 is not the manifest's; {remedy(folder)}"
            )
        return np.memmap(path, dtype=dtype, mode="r"), verify
    except OSError as error:
        raise DataError(f"{cannot_read(folder / file, error)}; {remedy(folder)}") from error
    except ValueError as error:  # of files.inside
        raise error if isinstance(error, DataError) else DataError(str(error)) from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
