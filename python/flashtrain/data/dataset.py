"""A prepared dataset as training and validation read it.

The order of training is a pure function: the samples of a global step depend on the dataset, the
seed, the step and the global batch size, and on nothing else. So a run may stop and go on anywhere,
on any number of ranks, and see the same tokens in the same order.

The tokens of a split are cut into windows of seq_len + 1, each starting at the last token of the
one before: the inputs are its first seq_len tokens, the targets its last, and every token but the
first is a target exactly once. The last partial window takes no part in training.

Legend: B batch, T sequence.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashtrain.data.errors import DataError
from flashtrain.data.permutation import Permutation
from flashtrain.data.token_files import open_split, read_manifest
from flashtrain.data.tokenizer import Tokenizer, get_tokenizer


class TokenDataset:
    """Windows of tokens from a folder of prepared data.

    Args:
        folder: prepared data, see docs/data_format.md.
        seq_len: T, the number of inputs (and of targets) of a window.
        seed: of the shuffle.
        verify: compute the checksums of large files too.

    Raises:
        DataError: the folder is missing or damaged, its tokenizer is unknown, or it holds less than
            one window to train on.
    """

    def __init__(self, folder: Path, *, seq_len: int, seed: int, verify: bool = False):
        if seq_len < 1:
            raise DataError(f"data.seq_len={seq_len} must be at least 1")
        if not 0 <= seed < 2**64:
            raise DataError(f"data.seed={seed} must be in [0, 2**64)")
        self.folder = folder
        self.seq_len = seq_len
        self.seed = seed
        self.manifest = read_manifest(folder)
        self.tokenizer: Tokenizer = get_tokenizer(self.manifest.tokenizer)
        self.train_tokens = open_split(folder, self.manifest, "train", verify=verify)
        self.val_tokens = open_split(folder, self.manifest, "val", verify=verify)
        self.num_train_windows = (len(self.train_tokens) - 1) // seq_len
        if self.num_train_windows < 1:
            raise DataError(
                f"{folder} has {len(self.train_tokens):,} training tokens, fewer than a window of"
                f" data.seq_len + 1 = {seq_len + 1}; choose a smaller data.seq_len"
            )
        if len(self.val_tokens) < 2:
            raise DataError(f"{folder} has {len(self.val_tokens)} validation tokens, needed are 2")

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    def window_indices(self, step: int, global_batch_size: int) -> np.ndarray:
        """Indices, int64 [global_batch_size], of the training windows of a global step.

        Samples are numbered through the run; each epoch is another permutation of all windows, and
        a batch may end one epoch and begin the next.
        """
        if step < 0:
            raise DataError(f"step={step} must be at least 0")
        if global_batch_size < 1:
            raise DataError(f"global_batch_size={global_batch_size} must be at least 1")
        samples = step * global_batch_size + np.arange(global_batch_size, dtype=np.int64)
        epochs, positions = np.divmod(samples, self.num_train_windows)
        indices = np.empty_like(samples)
        for epoch in np.unique(epochs):
            permutation = Permutation(self.num_train_windows, self.seed, stream=int(epoch))
            indices[epochs == epoch] = permutation(positions[epochs == epoch])
        return indices

    def train_batch(
        self, step: int, global_batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The rank's slice of a global step.

        Ranks 0..world_size-1 hold consecutive slices of the step's samples.

        Returns:
            (tokens, targets), int64 [global_batch_size / world_size, T] on the CPU.

        Raises:
            DataError: the global batch is not a multiple of world_size, or an argument is out of
                range.
        """
        if not 0 <= rank < world_size:
            raise DataError(f"rank={rank} must be in [0, world_size={world_size})")
        if global_batch_size % world_size:
            raise DataError(
                f"global_batch_size={global_batch_size} is not a multiple of"
                f" world_size={world_size}"
            )
        share = global_batch_size // world_size
        indices = self.window_indices(step, global_batch_size)[rank * share : (rank + 1) * share]
        return self._windows(self.train_tokens, indices)

    def val_batches(
        self, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole validation split, each token but the first a target once; ranks take turns.

        Batches differ in their number of targets (the last windows may be fewer, and the very last
        one shorter, in a batch of its own), so weigh each batch's mean loss by `targets.numel()`;
        ranks may get different numbers of batches.

        Yields:
            (tokens, targets), int64 [at most batch_size, T] on the CPU.
        """
        num_windows = (len(self.val_tokens) - 1) // self.seq_len
        starts = range(0, num_windows, batch_size)
        for i, start in enumerate(starts):
            if i % world_size == rank:
                indices = np.arange(start, min(start + batch_size, num_windows))
                yield self._windows(self.val_tokens, indices)
        tail = self.val_tokens[num_windows * self.seq_len :]
        if len(tail) > 1 and len(starts) % world_size == rank:
            window = torch.from_numpy(tail.astype(np.int64))[None]
            yield window[:, :-1], window[:, 1:]

    def _windows(self, tokens: np.ndarray, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = np.empty((len(indices), self.seq_len + 1), np.int64)
        for row, index in zip(windows, indices, strict=True):
            start = index * self.seq_len
            row[:] = tokens[start : start + self.seq_len + 1]
        windows_t = torch.from_numpy(windows)
        return windows_t[:, :-1].contiguous(), windows_t[:, 1:].contiguous()
