"""Prepared data on disk: token files and their manifest, see docs/data_format.md.

A folder of prepared data holds `manifest.json` and for each split a raw little-endian integer file
of tokens and, where the documents are known, one of their ends. It is written beside its final
place and renamed into it, so a folder that exists under its final name is whole.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain.data.errors import DataError

FORMAT = "flashtrain-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
ENDS_DTYPE = np.dtype("<u8")

# Checksums of larger files are not computed at every start: reading 17 GB takes a minute.
VERIFY_AT_LOAD_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Documents:
    """The document index of a split: its file's name, its length and the SHA-256 of its bytes."""

    file: str
    count: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """One token file: its name in the folder, its length in tokens, the SHA-256 of its bytes, and
    the index of its documents, which older folders lack."""

    file: str
    tokens: int
    sha256: str
    documents: Documents | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the token files hold.

    Attributes:
        tokenizer: name for `get_tokenizer`.
        vocab_size: token ids are 0..vocab_size-1.
        dtype: of the token files, a key of `DTYPES`.
        source: where the text came from, free form.
        splits: by name, at least "train" and "val".
        tokenizer_sha256: of all that decides which tokens a text becomes; older folders lack it.
    """

    tokenizer: str
    vocab_size: int
    dtype: str
    source: dict[str, Any]
    splits: dict[str, Split]
    tokenizer_sha256: str | None = None

    def fingerprint(self, *, documents: bool = False) -> str:
        """A hash of what training reads: equal for the same tokens wherever they are, whatever
        their files and their source are called; with `documents`, of their ends too."""
        contents = [self.tokenizer, self.vocab_size, self.dtype]
        for name in SPLITS:
            split = self.splits[name]
            index = split.documents if documents else None
            contents += [name, split.tokens, split.sha256, index and [index.count, index.sha256]]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def to_json(self) -> str:
        fields = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(_without_none(fields), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError with the reason where the text is not a manifest of this version."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"is not JSON ({error})") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f'has no "format": "{FORMAT}"')
        if fields.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"has format version {fields.get('version')!r}, supported is {FORMAT_VERSION}"
            )
        try:
            manifest = cls(
                tokenizer=str(fields["tokenizer"]),
                vocab_size=int(fields["vocab_size"]),
                dtype=str(fields["dtype"]),
                source=dict(fields["source"]),
                splits={name: _parse_split(split) for name, split in fields["splits"].items()},
                tokenizer_sha256=fields.get("tokenizer_sha256"),
            )
            if manifest.vocab_size < 1:
                raise ValueError(f"vocab_size={manifest.vocab_size}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"lacks or garbles a field ({error!r})") from error
        if manifest.dtype not in DTYPES:
            raise ValueError(f"has dtype {manifest.dtype!r}, supported: {', '.join(DTYPES)}")
        missing = [name for name in SPLITS if name not in manifest.splits]
        if missing:
            raise ValueError(f"lacks the split {missing[0]!r}")
        return manifest


def _parse_split(fields: dict[str, Any]) -> Split:
    documents = None
    if "documents" in fields:
        of = fields["documents"]
        documents = Documents(str(of["file"]), int(of["count"]), str(of["sha256"]))
    split = Split(str(fields["file"]), int(fields["tokens"]), str(fields["sha256"]), documents)
    if split.tokens < 0 or (documents and documents.count < 0):
        raise ValueError(f"{split}")
    for file in [split.file] + ([documents.file] if documents else []):
        if Path(file).name != file:
            raise ValueError(f"{split}")
    return split


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return value


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
    if out_dir.exists():
        return
    for name, tokens in splits.items():
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise ValueError(
                f"{name} holds token {outside[0]}, outside the vocabulary of {vocab_size}"
            )
    dtype = dtype_for(vocab_size)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out_dir)
        with _staging(out_dir) as staging:
            written = {}
            for name, tokens in splits.items():
                data = np.ascontiguousarray(tokens, dtype=DTYPES[dtype]).tobytes()
                write_durably(staging / tokens_file(name), data)
                documents = None
                if ends is not None:
                    index = np.ascontiguousarray(ends[name], dtype=ENDS_DTYPE).tobytes()
                    file = documents_file(name)
                    write_durably(staging / file, index)
                    documents = Documents(file, len(ends[name]), hashlib.sha256(index).hexdigest())
                digest = hashlib.sha256(data).hexdigest()
                written[name] = Split(tokens_file(name), len(tokens), digest, documents)
            manifest = Manifest(tokenizer, vocab_size, dtype, source, written)
            write_durably(staging / MANIFEST, manifest.to_json().encode())
            staging.chmod(0o755)  # mkdtemp's 0o700 would hide the data from other users
            try:
                staging.rename(out_dir)
            except OSError:
                if not out_dir.exists():  # else another process was first
                    raise
            fsync_folder(out_dir.parent)
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {out_dir}: {error.strerror or error};"
            " set DATA_DIR to a folder that is writable and has space"
        ) from error


def remove_abandoned(out_dir: Path) -> None:
    """Removes what processes have left that were killed in `write_token_files`, where it can be."""
    with contextlib.suppress(OSError):
        for path in list(out_dir.parent.iterdir()):
            if path.name.startswith(_staging_prefix(out_dir)):
                with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(path)


@contextlib.contextmanager
def _staging(out_dir: Path) -> Iterator[Path]:
    """A new folder beside `out_dir`, removed in the end unless it was renamed.

    It is locked as long as its process lives, which tells it from an abandoned one.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=_staging_prefix(out_dir), dir=out_dir.parent))
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks: none is removed there
                stack.enter_context(_locked(path, fcntl.LOCK_EX))
            if not path.exists():  # removed before it was locked
                continue
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
            return


def _staging_prefix(out_dir: Path) -> str:
    return f".{out_dir.name}.writing-"


@contextlib.contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    """Holds a lock of the folder itself; the system releases it however this process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, operation)
        yield
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


def write_durably(path: Path, data: bytes) -> None:
    """Writes a new file and waits until the disk has it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(directory: Path) -> None:
    """Waits until the disk has the names in a folder."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of prepared data.

    Raises:
        DataError: the folder or the manifest is missing or not as documented.
    """
    if not folder.is_dir():
        raise DataError(
            f"no prepared data at {folder}: no such folder; `tools/bazel run"
            f" //experiments:prepare_data -- --dataset=<name> --out={folder}` makes it"
        )
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"no prepared data at {folder}: it has no {MANIFEST}; {_remedy(folder)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; {_remedy(folder)}") from error
    try:
        return Manifest.from_json(text)
    except ValueError as error:
        raise DataError(f"{path} {error}; {_remedy(folder)}") from error


def open_split(folder: Path, manifest: Manifest, name: str, *, verify: bool = False) -> np.ndarray:
    """A read-only memory map of a split's tokens, one-dimensional.

    The size is always checked, the SHA-256 where `verify` is set or the file is small.

    Raises:
        DataError: the file is missing, of another size or of other content than the manifest says.
    """
    split, dtype = manifest.splits[name], DTYPES[manifest.dtype]
    return _open(folder, split.file, split.tokens, dtype, split.sha256, verify)


def open_documents(
    folder: Path, manifest: Manifest, name: str, *, verify: bool = False
) -> np.ndarray | None:
    """A read-only memory map, uint64 [documents], of where each document of a split ends: the
    number of tokens up to and with its last; None where the folder has no index of documents.

    Raises:
        DataError: as for `open_split`.
    """
    documents = manifest.splits[name].documents
    if documents is None:
        return None
    return _open(folder, documents.file, documents.count, ENDS_DTYPE, documents.sha256, verify)


def verify_folder(folder: Path) -> Manifest:
    """Reads every byte of a folder of prepared data and compares the checksums.

    Raises:
        DataError: a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    for name, split in manifest.splits.items():
        open_split(folder, manifest, name, verify=True)
        ends = open_documents(folder, manifest, name, verify=True)
        if ends is not None and len(ends) and int(ends[-1]) != split.tokens:
            raise DataError(
                f"{folder / name}: its last document ends at {int(ends[-1]):,}, not at its"
                f" {split.tokens:,} tokens; {_remedy(folder)}"
            )
    return manifest


def _open(
    folder: Path, file: str, count: int, dtype: np.dtype, sha256: str, verify: bool
) -> np.ndarray:
    path = folder / file
    try:
        size, expected = path.stat().st_size, count * dtype.itemsize
        if size != expected:
            raise DataError(
                f"{path} holds {size:,} bytes, the manifest says {expected:,}; {_remedy(folder)}"
            )
        if size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        if (verify or size <= VERIFY_AT_LOAD_BYTES) and sha256_of(path) != sha256:
            raise DataError(
                f"{path} is damaged: its SHA-256 is not the manifest's; {_remedy(folder)}"
            )
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; {_remedy(folder)}"
        ) from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(folder: Path) -> str:
    return f"delete {folder} and prepare it again"
