"""The manifest of a folder of prepared data, see docs/data_format.md.

A manifest may come from anywhere: its fields are checked before they size or open anything.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain import files
from flashtrain.data.errors import DataError, cannot_read

FORMAT = "flashtrain-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_MAX_BYTES = 2**24  # of a manifest: thousands of splits
_MAX_COUNT = 2**56  # of tokens: more than any disk holds


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
        source: the origin of the text, in any form.
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
        """A hash of the tokens, and with `documents` of the ends of documents.

        It depends neither on the place of the folder nor on the names of files and source.
        """
        contents: list[Any] = [self.tokenizer, self.vocab_size, self.dtype]
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
        except RecursionError:
            raise ValueError("is not a manifest: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"is not JSON ({error})") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f'has no "format": "{FORMAT}"')
        if fields.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"has format version {fields.get('version')!r:.80}, supported is {FORMAT_VERSION}"
            )
        try:
            manifest = cls(
                tokenizer=_text(fields, "tokenizer"),
                vocab_size=_count(fields, "vocab_size", minimum=1),
                dtype=_text(fields, "dtype"),
                source=_object(fields, "source"),
                splits={n: _parse_split(n, s) for n, s in _object(fields, "splits").items()},
                tokenizer_sha256=fields.get("tokenizer_sha256")
                and _sha256(fields, "tokenizer_sha256"),
            )
            manifest.to_json()
        except RecursionError:
            raise ValueError("is not a manifest: it is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"lacks or garbles a field: {error}") from error
        if manifest.dtype not in DTYPES:
            raise ValueError(f"has dtype {manifest.dtype!r:.80}, supported: {', '.join(DTYPES)}")
        if manifest.vocab_size > 256 ** DTYPES[manifest.dtype].itemsize:
            raise ValueError(
                f"has a vocabulary of {manifest.vocab_size:,} tokens, more than its dtype"
                f" {manifest.dtype} holds"
            )
        missing = [name for name in SPLITS if name not in manifest.splits]
        if missing:
            raise ValueError(f"lacks the split {missing[0]!r}")
        return manifest


def _parse_split(name: str, fields: Any) -> Split:
    if not isinstance(fields, dict):
        raise ValueError(f"split {name!r:.80} is {fields!r:.80}")
    documents = None
    if "documents" in fields:
        of = _object(fields, "documents")
        documents = Documents(_file(of), _count(of, "count"), _sha256(of, "sha256"))
    return Split(_file(fields), _count(fields, "tokens"), _sha256(fields, "sha256"), documents)


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {value!r:.80}, not a string")
    return value


def _file(fields: dict[str, Any]) -> str:
    name = _text(fields, "file")
    if Path(name).name != name:
        raise ValueError(f"'file' is {name!r:.80}, not the name of a file in its folder")
    return name


def _object(fields: dict[str, Any], key: str) -> dict[str, Any]:
    value = fields.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key!r} is {value!r:.80}, not an object")
    return value


def _count(fields: dict[str, Any], key: str, minimum: int = 0) -> int:
    value = fields.get(key)
    if type(value) is not int or not minimum <= value < _MAX_COUNT:
        raise ValueError(f"{key!r} is {value!r:.80}, not a number from {minimum} on")
    return value


def _sha256(fields: dict[str, Any], key: str) -> str:
    value = _text(fields, key)
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{key!r} is {value!r:.80}, not a SHA-256 in hexadecimal digits")
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return value


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of prepared data.

    Raises:
        DataError: the folder or the manifest is missing or not as documented.
    """
    try:
        if not folder.is_dir():
            raise DataError(
                f"no prepared data at {folder}: no such folder; `tools/bazel run"
                f" //experiments:prepare_data -- --dataset=<name> --out={folder}` makes it"
            )
        path = files.inside(folder, MANIFEST)
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(
            f"no prepared data at {folder}: it has no {MANIFEST}; name another folder, or prepare"
            " data in a new one (prepare_data --out=<folder>)"
        ) from None
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(str(error)) from None
    except OSError as error:
        raise cannot_read(folder / MANIFEST, error) from error
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError(f"is not a manifest: it has more than {_MAX_BYTES:,} bytes")
        return Manifest.from_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); {remedy(folder)}") from error
    except ValueError as error:
        raise DataError(f"{path} {error}; {remedy(folder)}") from error


def remedy(folder: Path) -> str:
    """Advice for a damaged folder: never to delete it, since it may hold something else."""
    return f"move {folder} away and prepare the data again, or copy it again from where it is whole"
