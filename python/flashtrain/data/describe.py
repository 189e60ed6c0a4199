"""A step's samples in words, for inspecting data and for reports of skipped steps."""

from collections.abc import Iterable

import numpy as np

from flashtrain.data.dataset import TokenDataset

_SHOWN_TOKENS = 32


def describe_samples(dataset: TokenDataset, samples: Iterable[int]) -> list[str]:
    """A line for each sample: its window, the tokens and documents in it, how its text begins.

    Args:
        samples: numbers of samples through the run; of global step N with batches of B, N * B and
            the B - 1 after it.
    """
    numbers = np.array(list(samples), np.int64)
    sources, windows = dataset.locate(numbers)
    lines = []
    for sample, source_number, window in zip(numbers.tolist(), sources.tolist(), windows.tolist()):
        source = dataset.sources[source_number]
        first = window * dataset.seq_len
        tokens = source.train.read(first, _SHOWN_TOKENS).tolist()
        lines.append(
            f"sample {sample}: {source.folder.name} window {window}, tokens {first:,} to"
            f" {first + dataset.seq_len:,}{_documents(source.train.ends, first, dataset.seq_len)}:"
            f" {dataset.tokenizer.decode(tokens)!r}"
        )
    return lines


def _documents(ends: np.ndarray | None, first: int, length: int) -> str:
    """The documents of the tokens first..first+length, a window's inputs and targets."""
    if ends is None:
        return ""
    begin = int(np.searchsorted(ends, np.uint64(first), side="right"))
    end = int(np.searchsorted(ends, np.uint64(first + length), side="right"))
    return f", document {begin:,}" if begin == end else f", documents {begin:,} to {end:,}"
