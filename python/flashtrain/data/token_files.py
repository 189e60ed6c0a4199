"""Prepared data on disk: token files and their manifest, see docs/data_format.md.

A folder of prepared data holds `manifest.json` and one raw little-endian integer file per split. It
is written beside its final place and renamed into it, so a folder that exists under its final name
is whole.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain.data.errors import DataError

FORMAT = "flashtrain-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

# Checksums of larger files are not computed at every start: reading 17 GB takes a minute.
VERIFY_AT_LOAD_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Split:
    """One token file: its name in the folder, its length in tokens and the SHA-256 of its bytes."""

    file: str
    tokens: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the token files hold.

    Attributes:
        tokenizer: name for `get_tokenizer`.
        vocab_size: token ids are 0..vocab_size-1.
        dtype: of the token files, a key of `DTYPES`.
        source: where the text came from, free form.
        splits: by name, "train" and "val".
    """

    tokenizer: str
    vocab_size: int
    dtype: str
    source: dict[str, Any]
    splits: dict[str, Split]

    def to_json(self) -> str:
        fields = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

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
                splits={
                    name: Split(str(s["file"]), int(s["tokens"]), str(s["sha256"]))
                    for name, s in fields["splits"].items()
                },
            )
            if manifest.vocab_size < 1:
                raise ValueError(f"vocab_size={manifest.vocab_size}")
            for split in manifest.splits.values():
                if split.tokens < 0 or Path(split.file).name != split.file:
                    raise ValueError(f"{split}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"lacks or garbles a field ({error!r})") from error
        if manifest.dtype not in DTYPES:
            raise ValueError(f"has dtype {manifest.dtype!r}, supported: {', '.join(DTYPES)}")
        missing = [name for name in SPLITS if name not in manifest.splits]
        if missing:
            raise ValueError(f"lacks the split {missing[0]!r}")
        return manifest


def write_token_files(
    out_dir: Path,
    splits: Mapping[str, np.ndarray],
    *,
    tokenizer: str,
    vocab_size: int,
    source: dict[str, Any],
) -> None:
    """Writes prepared data to `out_dir`, all of it or nothing.

    Of several processes that write the same folder at once the first wins; the others drop their
    copy.

    Args:
        out_dir: the folder to create; one that exists is left as it is.
        splits: one-dimensional integer arrays of token ids, at least "train" and "val".
        tokenizer, vocab_size, source: see `Manifest`.

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
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        try:
            written = {}
            for name, tokens in splits.items():
                data = np.ascontiguousarray(tokens, dtype=DTYPES[dtype]).tobytes()
                _write_durably(staging / f"{name}.bin", data)
                written[name] = Split(f"{name}.bin", len(tokens), hashlib.sha256(data).hexdigest())
            manifest = Manifest(tokenizer, vocab_size, dtype, source, written)
            _write_durably(staging / MANIFEST, manifest.to_json().encode())
            staging.chmod(0o755)  # mkdtemp's 0o700 would hide the data from other users
            try:
                staging.rename(out_dir)
            except OSError:
                if not out_dir.exists():  # else another process was first
                    raise
            _fsync(out_dir.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {out_dir}: {error.strerror or error};"
            " set DATA_DIR to a folder that is writable and has space"
        ) from error


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fsync(directory: Path) -> None:
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
        raise DataError(f"no prepared data at {folder}: no such folder")
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
    path = folder / split.file
    try:
        size = path.stat().st_size
        expected = split.tokens * dtype.itemsize
        if size != expected:
            raise DataError(
                f"{path} holds {size:,} bytes, the manifest says {expected:,}; {_remedy(folder)}"
            )
        if size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        if verify or size <= VERIFY_AT_LOAD_BYTES:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != split.sha256:
                raise DataError(
                    f"{path} is damaged: its SHA-256 is not the manifest's; {_remedy(folder)}"
                )
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; {_remedy(folder)}"
        ) from error


def _remedy(folder: Path) -> str:
    return f"delete {folder} and prepare it again"
