"""Prepared datasets as training and validation read them.

The order of training is a pure function: sample number n of a run depends on the datasets, their
weights and the seed, and on nothing else. So a run may stop and continue anywhere, on any number of
ranks, and see the same tokens in the same order.

The tokens of a split are cut into windows of seq_len + 1. Each window starts at the last token of
the one before. The first seq_len tokens are the inputs and the last seq_len the targets, so every
token but the first is a target exactly once. Training does not use the last partial window.

Legend: B batch, T sequence, C documents of a window.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashtrain.data.errors import DataError
from flashtrain.data.interleave import Interleave
from flashtrain.data.manifest import Manifest, read_manifest, remedy
from flashtrain.data.permutation import Permutation
from flashtrain.data.token_files import check_tokens, open_documents, open_split
from flashtrain.data.tokenizer import Tokenizer, get_tokenizer

# Fewest columns of documents_BC: so few that they cost nothing, enough for most windows.
_MIN_DOCUMENTS = 8


@dataclasses.dataclass(frozen=True)
class Part:
    """One prepared folder of a dataset."""

    folder: Path
    weight: float


class TokenDataset:
    """Windows of tokens from a folder of prepared data, or from several, mixed by weight.

    Args:
        folder: prepared data, see docs/data_format.md; several as `Part`s.
        seq_len: T, the number of inputs (and of targets) of a window.
        seed: of the shuffle.
        document_mask: batches say where documents begin.
        verify: compute the checksums of large files too.

    Raises:
        DataError: a folder is missing or damaged, its tokenizer is unknown or not that of the
            others, it holds less than one window to train on, or no documents to mask.
    """

    def __init__(
        self,
        folder: Path | Sequence[Part],
        *,
        seq_len: int,
        seed: int,
        document_mask: bool = False,
        verify: bool = False,
    ):
        if seq_len < 1:
            raise DataError(f"data.seq_len={seq_len} must be at least 1")
        if not 0 <= seed < 2**64:
            raise DataError(f"data.seed={seed} must be in [0, 2**64)")
        parts = [Part(folder, 1.0)] if isinstance(folder, Path) else list(folder)
        self.seq_len = seq_len
        self.seed = seed
        self.document_mask = document_mask
        self.sources = [_Tokens(part.folder, seq_len, document_mask, verify) for part in parts]
        self.tokenizer: Tokenizer = get_tokenizer(self.sources[0].manifest.tokenizer)
        for source in self.sources:
            if source.manifest.tokenizer != self.tokenizer.name:
                raise DataError(
                    f"{source.folder} has the tokenizer {source.manifest.tokenizer!r}, but"
                    f" {self.sources[0].folder} has {self.tokenizer.name!r}; a mixture has one"
                )
        try:
            self._interleave = Interleave([part.weight for part in parts], seed)
        except ValueError as error:
            raise DataError(f"data.source: {error}") from error

    @property
    def vocab_size(self) -> int:
        return max(source.manifest.vocab_size for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens, of the documents where they are masked, and of a mixture's shares.

        It stays the same where folders are moved, renamed or copied.
        """
        parts = [
            (source.manifest.fingerprint(documents=self.document_mask), share)
            for source, share in zip(self.sources, self._interleave.shares, strict=True)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def num_train_windows(self) -> int:
        return sum(source.num_windows for source in self.sources)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places that samples are read from: indices into `sources`, and training windows.

        Samples are numbered through the run; each epoch of a source is another permutation of its
        windows, and a batch may end one epoch and begin the next.

        Args:
            samples: sample numbers from 0 on, int64 [n].

        Returns:
            (sources, windows), int64 [n] both.
        """
        if len(self.sources) == 1:
            sources, within = np.zeros_like(samples), samples
        else:
            sources, within = self._interleave(samples)
        windows = np.empty_like(samples)
        for number, source in enumerate(self.sources):
            of_source = sources == number
            windows[of_source] = source.windows(within[of_source], self.seed)
        return sources, windows

    def train_samples(
        self, first_sample: int, count: int, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, ...]:
        """The rank's share of `count` samples; ranks 0..world_size-1 hold consecutive shares.

        Returns:
            (tokens_BT, targets_BT), int64 on the CPU, B = count / world_size; with
            `document_mask` also (documents_BC, positions_BT): int32, where the documents of each
            window begin, the first at 0, filled up with T, C a power of two; and int64, each
            token's position in its document, or in the window if the document began before it.

        Raises:
            DataError: `count` is not a multiple of world_size, or an argument is out of range.
        """
        if not 0 <= rank < world_size:
            raise DataError(f"rank={rank} must be in [0, world_size={world_size})")
        if first_sample < 0:
            raise DataError(f"first_sample={first_sample} must be at least 0")
        if count < 1 or count % world_size:
            raise DataError(f"{count} samples are not a multiple of world_size={world_size}")
        share = count // world_size
        begin = first_sample + rank * share
        sources, windows = self.locate(np.arange(begin, begin + share, dtype=np.int64))
        places = [
            (self.sources[source], window * self.seq_len)
            for source, window in zip(sources.tolist(), windows.tolist())
        ]
        rows = np.empty((share, self.seq_len + 1), np.int64)
        for row, (source, start) in zip(rows, places):
            row[:] = source.train.read(start, self.seq_len + 1)
        if not self.document_mask:
            return _batch(rows, None)
        return _batch(rows, [source.train.document_starts(s, self.seq_len) for source, s in places])

    def train_batch(
        self, step: int, global_batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, ...]:
        """The rank's share of a step, with all batches of one size; see `train_samples`."""
        if step < 0:
            raise DataError(f"step={step} must be at least 0")
        if global_batch_size < 1:
            raise DataError(f"global_batch_size={global_batch_size} must be at least 1")
        return self.train_samples(
            step * global_batch_size, global_batch_size, rank=rank, world_size=world_size
        )

    def val_batches(
        self, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """The whole validation splits, one after the other; ranks read batches in turn.

        Every token of a split but the first is a target once. Batches differ in their number of
        targets (the last windows may be fewer, and the very last one shorter, in a batch of its
        own), so weigh each batch's mean loss by `targets.numel()`. Ranks may get different numbers
        of batches.

        Yields:
            Batches as of `train_samples`, of at most batch_size windows.
        """
        turn = 0
        for source in self.sources:
            for windows in source.val.batches(batch_size, self.seq_len):
                if turn % world_size == rank:
                    yield self._val_batch(source.val, *windows)
                turn += 1

    def _val_batch(
        self, split: "_Split", first: int, count: int, length: int
    ) -> tuple[Tensor, ...]:
        tokens = split.read(first, count * length + 1).astype(np.int64)
        rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length].copy()
        if not self.document_mask:
            return _batch(rows, None)
        return _batch(
            rows, [split.document_starts(first + i * length, length) for i in range(count)]
        )


@dataclasses.dataclass(frozen=True)
class _Split:
    """One split of a folder: its tokens and, where they are known, the ends of its documents."""

    folder: Path
    manifest: Manifest
    name: str
    tokens: np.ndarray
    ends: np.ndarray | None

    def read(self, first: int, count: int) -> np.ndarray:
        """Tokens from `first` on. Raises DataError where one is outside the vocabulary."""
        tokens = self.tokens[first : first + count]
        check_tokens(tokens, self.manifest, self.folder / self.manifest.splits[self.name].file)
        return tokens

    def document_starts(self, first: int, length: int) -> np.ndarray:
        """Where documents begin in the tokens first..first+length-1: 0, and after each end."""
        assert self.ends is not None
        begin = np.searchsorted(self.ends, np.uint64(first), side="right")
        end = np.searchsorted(self.ends, np.uint64(first + length), side="left")
        inner = self.ends[begin:end].astype(np.int64) - first
        starts = np.concatenate([[0], inner])
        if end < begin or (np.diff(starts, append=length) < 0).any():
            raise DataError(
                f"{self.folder}: the documents of {self.name!r} are in no order;"
                f" {remedy(self.folder)}"
            )
        return starts

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[int, int, int]]:
        """(first token, windows, inputs of each) of batches that cover the split."""
        num_windows = (len(self.tokens) - 1) // seq_len
        for window in range(0, num_windows, batch_size):
            yield window * seq_len, min(batch_size, num_windows - window), seq_len
        rest = len(self.tokens) - 1 - num_windows * seq_len
        if rest:
            yield num_windows * seq_len, 1, rest


class _Tokens:
    """One folder of prepared data, opened."""

    def __init__(self, folder: Path, seq_len: int, document_mask: bool, verify: bool):
        self.folder = folder
        self.manifest = read_manifest(folder)
        splits = {}
        for name in ("train", "val"):
            tokens = open_split(folder, self.manifest, name, verify=verify)
            ends = open_documents(folder, self.manifest, name, verify=verify)
            if document_mask and ends is None:
                raise DataError(
                    f"data.document_mask needs to know where documents end, but {folder} has no"
                    " index of documents; prepare the data again in another folder"
                )
            splits[name] = _Split(folder, self.manifest, name, tokens, ends)
        self.train, self.val = splits["train"], splits["val"]
        self.num_windows = (len(self.train.tokens) - 1) // seq_len
        if self.num_windows < 1:
            raise DataError(
                f"{folder} has {len(self.train.tokens):,} training tokens, fewer than a window of"
                f" data.seq_len + 1 = {seq_len + 1}; choose a smaller data.seq_len"
            )
        if len(self.val.tokens) < 2:
            raise DataError(f"{folder} has {len(self.val.tokens)} validation tokens, needed are 2")

    def windows(self, samples: np.ndarray, seed: int) -> np.ndarray:
        """The windows, int64, that are this folder's samples of the given numbers."""
        epochs, positions = np.divmod(samples, self.num_windows)
        indices = np.empty_like(samples)
        for epoch in np.unique(epochs):
            permutation = Permutation(self.num_windows, seed, stream=int(epoch))
            indices[epochs == epoch] = permutation(positions[epochs == epoch])
        return indices


def _batch(rows: np.ndarray, starts: Sequence[np.ndarray] | None) -> tuple[Tensor, ...]:
    """Tensors of windows, int64 [B, T + 1], and of where their documents begin."""
    windows_t = torch.from_numpy(rows)
    batch = (windows_t[:, :-1].contiguous(), windows_t[:, 1:].contiguous())
    if starts is None:
        return batch
    length = rows.shape[1] - 1
    most = max(map(len, starts))
    columns = max(_MIN_DOCUMENTS, 1 << (most - 1).bit_length())
    documents_BC = np.full((len(rows), columns), length, np.int32)
    positions_BT = np.empty((len(rows), length), np.int64)
    for documents, positions, of_row in zip(documents_BC, positions_BT, starts):
        documents[: len(of_row)] = of_row
        lengths = np.diff(of_row, append=length)
        positions[:] = np.arange(length) - np.repeat(of_row, lengths)
    return (*batch, torch.from_numpy(documents_BC), torch.from_numpy(positions_BT))
