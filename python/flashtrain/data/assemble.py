"""From chunks to a folder of prepared data: join, hold out validation documents, checksum.

After a kill, each step is either repeated or found done. Chunks are removed once their tokens are
in the joined file and it is flushed, so the disk holds the tokens once (twice while validation
documents are held out), and memory holds a chunk for each process.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from flashtrain import files
from flashtrain.data.chunks import ChunkId, chunk_size, list_chunks, read_chunk, replace_durably
from flashtrain.data.corpus import Corpus
from flashtrain.data.errors import DataError
from flashtrain.data.manifest import Documents, Split
from flashtrain.data.token_files import (
    ENDS_DTYPE,
    documents_file,
    sha256_of,
    tokens_file,
)
from flashtrain.data.workers import cannot_start, context, die_with_parent

# Of the documents, and the seed that chooses them: those of the published recipes.
VALIDATION_SHARE = 0.0005
VALIDATION_SEED = 2357

_PLAN = "plan.json"
_BLOCK_DOCUMENTS = 2**12  # moved by one task: some five million tokens
_BLOCK_TOKENS = 2**23  # written at a time
_INDEX_DOCUMENTS = 2**20  # whose ends are in memory at a time


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A chunk and where its tokens and ends go in the joined files of its split."""

    chunk: ChunkId
    first_token: int
    first_end: int


def assemble(
    corpus: Corpus, chunks: Path, out: Path, dtype: np.dtype, num_processes: int
) -> dict[str, Split]:
    """Writes the token files and document indices of all splits to the folder `out`.

    Args:
        corpus: all of whose chunks are in `chunks`.
        chunks: emptied as its content is moved.
        dtype: of the token files.

    Raises:
        DataError: there are not enough documents to hold some out.
        OSError: a file cannot be written.
    """
    plan = _plan(corpus, chunks, dtype)
    with _Pool(num_processes) as pool:
        for split in corpus.splits:
            placed = [p for p in plan if p.chunk.split == split]
            pool.run(_join, ((p, chunks, chunks / split, dtype) for p in placed))
        if "val" in corpus.splits:
            for split in corpus.splits:
                _move(chunks / split, out, split)
        else:
            _hold_out(chunks / "train", out, dtype, pool)
    return _describe(out, [*corpus.splits, *({"val"} - set(corpus.splits))], dtype)


def has_begun(chunks: Path) -> bool:
    """Whether chunks may have been moved, so that a missing one is no longer to be made."""
    return (chunks / _PLAN).exists()


def _plan(corpus: Corpus, folder: Path, dtype: np.dtype) -> list[_Placed]:
    """The place of each chunk; written down before the first one is moved."""
    path = folder / _PLAN
    if not path.exists():
        sizes: list[tuple[Any, int, int]] = [
            (dataclasses.astuple(chunk), *chunk_size(chunk.path(folder)))
            for split, shards in corpus.splits.items()
            for chunk in list_chunks(folder, split, len(shards))
        ]
        for split in corpus.splits:
            of_split = [(ends, tokens) for chunk, ends, tokens in sizes if chunk[0] == split]
            for suffix, bytes_needed in (
                (".ends", sum(ends for ends, _ in of_split) * ENDS_DTYPE.itemsize),
                (".tokens", sum(tokens for _, tokens in of_split) * dtype.itemsize),
            ):
                with (folder / f"{split}{suffix}").open("wb") as file:
                    file.truncate(bytes_needed)
        replace_durably(path, json.dumps(sizes).encode())
    plan = []
    tokens: dict[str, int] = {}
    ends: dict[str, int] = {}
    for fields, num_ends, num_tokens in json.loads(path.read_text()):
        chunk = ChunkId(*fields)
        plan.append(_Placed(chunk, tokens.get(chunk.split, 0), ends.get(chunk.split, 0)))
        tokens[chunk.split] = plan[-1].first_token + num_tokens
        ends[chunk.split] = plan[-1].first_end + num_ends
    return plan


def _join(placed: _Placed, folder: Path, joined: Path, dtype: np.dtype) -> None:
    """Moves a chunk to its place; one that is gone has been moved before."""
    path = placed.chunk.path(folder)
    try:
        chunk = read_chunk(path, dtype)
    except FileNotFoundError:
        return
    ends = chunk.ends + np.uint64(placed.first_token)
    for suffix, array, first in (
        (".tokens", chunk.tokens, placed.first_token),
        (".ends", ends, placed.first_end),
    ):
        _write_at(joined.with_suffix(suffix), array, first * array.itemsize)
    path.unlink(missing_ok=True)


def _write_at(path: Path, array: np.ndarray, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        data = memoryview(np.ascontiguousarray(array)).cast("B")
        while data:
            written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[written:], offset + written
        files.flush(file)


def _move(joined: Path, out: Path, split: str) -> None:
    for suffix, name in ((".tokens", tokens_file(split)), (".ends", documents_file(split))):
        source = joined.with_suffix(suffix)
        if source.exists():  # else it has been moved before
            source.replace(out / name)


def _hold_out(joined: Path, out: Path, dtype: np.dtype, pool: "_Pool") -> None:
    """Shuffles all documents and gives the first `VALIDATION_SHARE` of them to validation.

    The same documents in the same order as `datasets.Dataset.train_test_split(test_size=0.0005,
    seed=2357)` has them, which the published recipes use.
    """
    total = joined.with_suffix(".ends").stat().st_size // ENDS_DTYPE.itemsize
    num_val = math.ceil(total * VALIDATION_SHARE)
    if total - num_val < 1:
        raise DataError(
            f"holding out a document for validation takes 2 that are not empty, there are {total};"
            " cut the text into several documents"
        )
    order = _shuffled_order(joined.with_suffix(".order"), total)
    for split, first, last in (("val", 0, num_val), ("train", num_val, total)):
        tokens = _write_ends(joined, order[first:last], out / documents_file(split))
        with (out / tokens_file(split)).open("wb") as file:
            file.truncate(tokens * dtype.itemsize)
        blocks = (
            (joined, first, begin, min(begin + _BLOCK_DOCUMENTS, last - first), out, split, dtype)
            for begin in range(0, last - first, _BLOCK_DOCUMENTS)
        )
        pool.run(_gather, blocks)


def _shuffled_order(path: Path, total: int) -> np.ndarray:
    """The result of default_rng(seed).permutation(total); 8 bytes for a document.

    It is made in memory and stored on the disk for the processes that gather documents. It is not
    written through a mapping: on a full disk, that kills the process without a word.
    """
    if not path.exists():
        order = np.arange(total, dtype=np.int64)
        np.random.default_rng(VALIDATION_SEED).shuffle(order)
        replace_durably(path, order.data.cast("B"))
    return np.memmap(path, np.int64, mode="r")


def _write_ends(joined: Path, order: np.ndarray, path: Path) -> int:
    """The ends of documents in another order; returns their number of tokens."""
    ends = np.memmap(joined.with_suffix(".ends"), ENDS_DTYPE, mode="r")
    total = 0
    with path.open("wb") as file:
        for begin in range(0, len(order), _INDEX_DOCUMENTS):
            documents = order[begin : begin + _INDEX_DOCUMENTS]
            new = total + np.cumsum(ends[documents] - _starts(ends, documents), dtype=ENDS_DTYPE)
            file.write(new.tobytes())
            total = int(new[-1])
    return total


def _starts(ends: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Where documents start: at the end of the one before each."""
    return np.where(documents > 0, ends[documents - 1], 0).astype(ENDS_DTYPE)


def _gather(
    joined: Path, first: int, begin: int, end: int, out: Path, split: str, dtype: np.dtype
) -> None:
    """Copies the documents begin..end-1 of a split from where they are in the joined file."""
    tokens = np.memmap(joined.with_suffix(".tokens"), dtype, mode="r")
    ends = np.memmap(joined.with_suffix(".ends"), ENDS_DTYPE, mode="r")
    order = np.memmap(joined.with_suffix(".order"), np.int64, mode="r")
    documents = np.array(order[first + begin : first + end])
    starts, stops = _starts(ends, documents).tolist(), ends[documents].tolist()
    new_ends = np.memmap(out / documents_file(split), ENDS_DTYPE, mode="r")
    offset = int(new_ends[begin - 1]) if begin else 0
    block: list[np.ndarray] = []
    size = 0
    for i, (start, stop) in enumerate(zip(starts, stops), start=1):
        block.append(tokens[start:stop])
        size += stop - start
        if size >= _BLOCK_TOKENS or i == len(starts):
            _write_at(out / tokens_file(split), np.concatenate(block), offset * dtype.itemsize)
            block, size, offset = [], 0, offset + size


def _describe(folder: Path, splits: Iterable[str], dtype: np.dtype) -> dict[str, Split]:
    """Lengths and checksums; all files at once, since hashing releases the interpreter's lock."""

    def digest(split: str, name: Callable[[str], str], itemsize: int) -> tuple[str, int, str]:
        path = folder / name(split)
        return name(split), path.stat().st_size // itemsize, sha256_of(path)

    with ThreadPoolExecutor() as threads:
        tokens = {s: threads.submit(digest, s, tokens_file, dtype.itemsize) for s in splits}
        ends = {s: threads.submit(digest, s, documents_file, ENDS_DTYPE.itemsize) for s in splits}
    for path in folder.iterdir():
        with path.open("rb") as file:
            files.flush(file)
    files.flush_folder(folder)
    return {s: Split(*tokens[s].result(), Documents(*ends[s].result())) for s in splits}


class _Pool:
    """Runs functions for their effect, on several processes where there is enough to do."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., None], tasks: Iterator[tuple[Any, ...]]) -> None:
        first = list(itertools.islice(tasks, 4))
        if len(first) < 4 or self._num_processes == 1:
            for task in itertools.chain(first, tasks):
                function(*task)
            return
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self._num_processes, mp_context=context(), initializer=die_with_parent
            )
        try:
            all_tasks = itertools.chain(first, tasks)
            try:
                futures = [self._executor.submit(function, *task) for task in all_tasks]
            except BrokenPipeError:
                raise
            except OSError as error:
                raise cannot_start(error) from error
            for future in futures:
                future.result()
        except (BrokenProcessPool, BrokenPipeError) as error:  # later, or as it began
            raise DataError(
                "a process that assembles the data was killed; the machine may be out of memory;"
                " what is done is kept, run it again to go on"
            ) from error
