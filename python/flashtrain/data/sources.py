"""Datasets by name: the sources of their text, and their prepared folders.

| source                    | text                                                            |
|---------------------------|-----------------------------------------------------------------|
| openwebtext               | the hub's Skylion007/openwebtext                                |
| the_pile, the_pile:<dir>  | The Pile's own shards, train/*.jsonl.zst and val.jsonl.zst; the |
|                           | folder is ${DATA_DIR}/the_pile_shards where none is named       |
| pile_uncopyrighted        | the hub's monology/pile-uncopyrighted                           |
| pile_deduplicated         | the hub's EleutherAI/the_pile_deduplicated                      |
| wikitext103, wikitext2    | the hub's Salesforce/wikitext, raw                              |
| shakespeare               | see shakespeare.py; bytes                                       |
| shakespeare_gpt2          | the same works as GPT-2's tokens                                |
| text:<glob>               | files, each a document                                          |
| jsonl:<glob>:<field>      | files of JSON objects, one a line                               |
| parquet:<glob>:<column>   | Parquet files                                                   |
| hf:<name>[:<config>[:<column>]] | any dataset that `datasets` can stream                    |
"""

import dataclasses
import glob
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashtrain.data import hub
from flashtrain.data.corpus import Corpus, HubSplit, JsonLines, Parquet, Shard, TextFiles, Texts
from flashtrain.data.errors import DataError, TextGoneError
from flashtrain.data.identity import Files
from flashtrain.data.job import Source
from flashtrain.data.paths import cache_dir, matching_files, user_path, user_pattern
from flashtrain.data.preparation import Summary, prepare_source, summarize
from flashtrain.data.shakespeare import (
    EDITION,
    VALIDATION_WORKS,
    prepare_shakespeare,
    read_works,
)
from flashtrain.errors import did_you_mean

_GPT2 = "gpt2"
# Small files are read by the hundred, since each shard has its own record.
_SHARD_BYTES = 2**26
_SHARD_FILES = 1000


@dataclasses.dataclass(frozen=True)
class HubSource:
    """A dataset of the hub, or a local folder in its layout."""

    dataset: str
    name: str
    config: str | None = None
    column: str | None = None
    end_of_text: bool = True
    tokenizer: str = _GPT2

    def description(self) -> dict[str, Any]:
        name = None if self._folder() else self.name  # a folder is identified by its content
        known = {"hub": name, "config": self.config, "column": self.column}
        return {key: value for key, value in known.items() if value is not None}

    def files(self) -> Files:
        folder = self._folder()
        if folder is None:
            return {}
        found = matching_files(f"{glob.escape(str(folder))}/**/*")
        return {str(file.relative_to(folder)): [file] for file in found}

    def revision(self) -> str | None:
        return None if self._folder() else hub.revision(self.name, self.config)

    def corpus(self, revision: str | None = None) -> Corpus:
        name = str(self._folder() or self.name)
        info = hub.describe(name, self.config, self.column, revision)
        splits: dict[str, tuple[Shard, ...]] = {
            ours: tuple(
                HubSplit(
                    name, self.config, theirs, info.column, i, shards, self.end_of_text, revision
                )
                for i in range(shards)
            )
            for ours, (theirs, shards) in info.splits.items()
        }
        return Corpus(splits, self.end_of_text)

    def _folder(self) -> Path | None:
        """The local folder of that name; `datasets` looks for one before it asks the hub."""
        folder = user_path(self.name)
        if os.path.isdir(folder):
            return folder
        if self.name.startswith(("/", "./", "../", "~")):
            raise TextGoneError(f"{self.dataset}: {folder} is no folder")
        return None


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Local files.

    Attributes:
        patterns: absolute globs by split; a split "test" may be missing.
        shards: from the files of a split.
        reading: how text is read from them, for the manifest.
        hint: advice where files are missing.
    """

    dataset: str
    patterns: dict[str, str]
    shards: Callable[[Sequence[Path]], tuple[Shard, ...]]
    reading: dict[str, str]
    hint: str = "the pattern is relative to the folder you are in; quote it from the shell"
    tokenizer: str = _GPT2

    def description(self) -> dict[str, Any]:
        return self.reading

    def files(self) -> Files:
        found = {}
        for split, pattern in self.patterns.items():
            found[split] = matching_files(pattern)
            if not found[split] and split != "test":
                raise TextGoneError(f"{self.dataset}: no file matches {pattern}; {self.hint}")
        return {split: files for split, files in found.items() if files}

    def revision(self) -> None:
        return None

    def corpus(self, revision: str | None = None) -> Corpus:
        return Corpus({split: self.shards(files) for split, files in self.files().items()})


@dataclasses.dataclass(frozen=True)
class WorksSource:
    """The works of Shakespeare, each a document, as GPT-2's tokens."""

    dataset: str
    tokenizer: str = _GPT2

    def description(self) -> dict[str, Any]:
        return {
            "package": "shakespeare 0.6",
            "edition": EDITION,
            "validation_works": list(VALIDATION_WORKS),
        }

    def files(self) -> Files:
        return {}

    def revision(self) -> None:
        return None

    def corpus(self, revision: str | None = None) -> Corpus:
        works = read_works()
        train = tuple(text for name, text in works.items() if name not in VALIDATION_WORKS)
        val = tuple(works[name] for name in VALIDATION_WORKS)
        return Corpus({"train": (Texts(train),), "val": (Texts(val),)})


def _text_shards(files: Sequence[Path]) -> tuple[Shard, ...]:
    """Files in groups, in order."""
    groups: list[list[Path]] = []
    size = _SHARD_BYTES
    for file in files:
        if size >= _SHARD_BYTES or len(groups[-1]) >= _SHARD_FILES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.stat().st_size
    return tuple(TextFiles(tuple(group)) for group in groups)


def _json_shards(field: str) -> Callable[[Sequence[Path]], tuple[Shard, ...]]:
    return lambda files: tuple(JsonLines(file, field) for file in files)


def _parquet_shards(column: str) -> Callable[[Sequence[Path]], tuple[Shard, ...]]:
    return lambda files: tuple(Parquet(file, column) for file in files)


def _pile(folder: Path) -> FileSource:
    within = glob.escape(str(folder))
    return FileSource(
        "the_pile",
        {
            "train": f"{within}/train/*.jsonl.zst",
            "val": f"{within}/val.jsonl.zst",
            "test": f"{within}/test.jsonl.zst",
        },
        _json_shards("text"),
        {"format": "jsonl", "field": "text"},
        "The Pile is no longer served by its publishers: name a folder of its shards as"
        " the_pile:<folder>, or take a mirror, pile_uncopyrighted or pile_deduplicated, whose text"
        " is not all of it",
    )


def _wikitext(dataset: str, config: str) -> HubSource:
    # Its published token counts are of the lines one after the other, without ends of text.
    return HubSource(dataset, "Salesforce/wikitext", config, "text", end_of_text=False)


_NAMED: dict[str, Callable[[str], Source]] = {
    "openwebtext": lambda dataset: HubSource(dataset, "Skylion007/openwebtext"),
    "pile_deduplicated": lambda dataset: HubSource(dataset, "EleutherAI/the_pile_deduplicated"),
    "pile_uncopyrighted": lambda dataset: HubSource(dataset, "monology/pile-uncopyrighted"),
    "shakespeare_gpt2": WorksSource,
    "the_pile": lambda dataset: _pile(cache_dir("the_pile_shards")),
    "wikitext103": lambda dataset: _wikitext(dataset, "wikitext-103-raw-v1"),
    "wikitext2": lambda dataset: _wikitext(dataset, "wikitext-2-raw-v1"),
}
_FORMS = {
    "hf": "hf:<name>[:<config>[:<column>]]",
    "jsonl": "jsonl:<glob>:<field>",
    "parquet": "parquet:<glob>:<column>",
    "text": "text:<glob>",
    "the_pile": "the_pile:<folder>",
}


def parse_source(dataset: str) -> Source:
    """The source that a name or description stands for.

    Raises:
        DataError: there is none of that name or form.
    """
    kind, colon, rest = dataset.partition(":")
    if not colon and dataset in _NAMED:
        return _NAMED[dataset](dataset)
    if not colon or kind not in _FORMS:
        valid = [*_NAMED, "shakespeare"]
        raise DataError(
            f"dataset {dataset!r} is unknown; {did_you_mean(dataset, valid)} Names:"
            f" {', '.join(sorted(valid))}; forms: {', '.join(sorted(_FORMS.values()))}"
        )
    if kind == "text" and rest:
        return FileSource(dataset, {"train": user_pattern(rest)}, _text_shards, {"format": kind})
    if kind == "the_pile" and rest:
        return _pile(user_path(rest))
    if kind in ("jsonl", "parquet"):
        pattern, _, field = rest.rpartition(":")
        if pattern and field:
            shards, key = (
                (_json_shards, "field") if kind == "jsonl" else (_parquet_shards, "column")
            )
            reading = {"format": kind, key: field}
            return FileSource(dataset, {"train": user_pattern(pattern)}, shards(field), reading)
    if kind == "hf":
        name, *more = rest.split(":")
        if name and len(more) <= 2:
            config, column = [*more, "", ""][:2]
            return HubSource(dataset, name, config or None, column or None)
    raise DataError(f"dataset {dataset!r} is incomplete; its form is {_FORMS[kind]}")


def default_folder(dataset: str) -> Path:
    """The folder of a source's prepared data where none is named: ${DATA_DIR}/<name>."""
    if dataset.startswith("the_pile:"):
        return cache_dir("the_pile")  # wherever its shards were
    if re.fullmatch(r"\w+", dataset):
        return cache_dir(dataset)
    readable = re.sub(r"\W+", "-", os.path.basename(dataset) or dataset).strip("-")[:40]
    kind = dataset.partition(":")[0]
    digest = hashlib.sha256(dataset.encode("utf-8", "surrogatepass")).hexdigest()
    return cache_dir(f"{kind}-{readable}-{digest[:8]}")


def prepare(dataset: str, folder: Path | None = None, *, workers: int = 0) -> Summary:
    """Prepares a dataset, unless that is done.

    Args:
        dataset: a name or description, see above.
        folder: of the prepared data; None: ${DATA_DIR}/<name>, else ./data/<name>.
        workers: processes that tokenize; 0: one for each core.

    Raises:
        DataError: the dataset is unknown or cannot be prepared.
    """
    folder = folder or default_folder(dataset)
    if dataset == "shakespeare":
        began = time.perf_counter()
        prepare_shakespeare(folder)
        return summarize(folder, time.perf_counter() - began, None)
    return prepare_source(parse_source(dataset), folder, workers=workers)
