"""Brings batches to the device ahead of time: reading, pinning and copying overlap the steps.

While a step computes, a thread reads the next batch from the memory map (from a disk, if it must)
into pinned memory, and a separate stream copies it to the device. A call for a batch then waits for
neither disk nor host: the device's own stream waits for the copy, which was done long before.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor


class Samples(Protocol):
    """What batches are loaded from: a dataset of any kind."""

    def train_samples(
        self, first_sample: int, count: int, *, rank: int, world_size: int
    ) -> Sequence[Tensor]:
        """The rank's share of `count` samples of the run, on the CPU; see TokenDataset."""


class BatchLoader:
    """This rank's batches of a run, one after the other.

    Args:
        dataset: where they come from.
        first_sample: number of the first sample to load, through the run.
        rank, world_size: this process among those that share each batch.
        device: where batches go.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        first_sample: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ):
        self._dataset = dataset
        self._sample = first_sample
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch-loader")
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._ahead: tuple[int, Future[tuple[Tensor, ...]]] | None = None

    def next(self, count: int, *, next_count: int | None = None) -> tuple[Tensor, ...]:
        """The rank's share of the next `count` samples, on the device; loads the next one.

        Args:
            count: samples of this batch on all ranks.
            next_count: of the one after it, the same if None; 0: there is none.

        Returns:
            As the dataset has it.

        Raises:
            DataError: see there.
        """
        if self._ahead is None or self._ahead[0] != count:
            self._load_ahead(count)
        assert self._ahead is not None
        batch = self._ahead[1].result()
        self._ahead = None
        self._sample += count
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in batch:
                tensor.record_stream(current)
        if next_count is None:
            next_count = count
        if next_count:
            self._load_ahead(next_count)
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _load_ahead(self, count: int) -> None:
        self._ahead = (count, self._thread.submit(self._load, self._sample, count))

    def _load(self, first_sample: int, count: int) -> tuple[Tensor, ...]:
        batch = self._dataset.train_samples(
            first_sample, count, rank=self._rank, world_size=self._world_size
        )
        if self._stream is None:
            return tuple(batch)
        with torch.cuda.stream(self._stream):
            return tuple(t.pin_memory().to(self._device, non_blocking=True) for t in batch)
