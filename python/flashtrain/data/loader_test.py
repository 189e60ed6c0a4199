"""The loader's batches are the dataset's, on the device, and ahead of the step that needs them."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from flashtrain.data import BatchLoader, DataError, TokenDataset
from flashtrain.data.token_files import write_token_files
from flashtrain.testing.devices import DEVICE, cuda_only

SEQ_LEN = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    folder: Path = tmp_path_factory.mktemp("data") / "prepared"
    tokens = np.arange(20_000) % 256
    write_token_files(
        folder,
        {"train": tokens, "val": tokens[:100]},
        ends={"train": np.append(np.arange(7, 20_000, 7), 20_000), "val": np.array([100])},
        tokenizer="bytes",
        vocab_size=256,
        source={},
    )
    return TokenDataset(folder, seq_len=SEQ_LEN, seed=3, document_mask=True)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 4)])
def test_batches_are_the_datasets(dataset, rank, world_size):
    loader = BatchLoader(dataset, first_sample=24, rank=rank, world_size=world_size, device=DEVICE)
    for number in range(20):
        batch = loader.next(8)
        expected = dataset.train_samples(24 + 8 * number, 8, rank=rank, world_size=world_size)
        assert len(batch) == len(expected) == 4
        for tensor, right in zip(batch, expected):
            assert tensor.device.type == DEVICE.type
            assert torch.equal(tensor.cpu(), right)
    loader.close()


def test_batch_sizes_may_change(dataset):
    loader = BatchLoader(dataset, device=DEVICE)
    first = 0
    for count, announced in ((4, None), (4, 8), (8, 2), (16, 16), (16, 0), (4, 0)):
        batch = loader.next(count, next_count=announced)  # the announced size may be wrong
        assert torch.equal(batch[0].cpu(), dataset.train_samples(first, count)[0])
        first += count
    loader.close()


def test_the_next_batch_is_read_while_the_step_computes(dataset):
    read = threading.Event()

    class Watched:
        def train_samples(self, first_sample, *arguments, **options):
            batch = dataset.train_samples(first_sample, *arguments, **options)
            if first_sample == 8:
                read.set()
            return batch

    loader = BatchLoader(Watched(), device=DEVICE)
    loader.next(8)
    assert read.wait(timeout=60)  # without a second call of next
    loader.close()


def test_errors_come_to_the_caller(dataset):
    loader = BatchLoader(dataset, world_size=3, device=DEVICE)
    with pytest.raises(DataError, match="8 samples are not a multiple of world_size=3"):
        loader.next(8)
    assert len(loader.next(9)[0]) == 3
    loader.close()


@cuda_only
def test_copies_are_whole_while_the_device_is_busy(dataset):
    """A long queue of work ahead, and batches freed at once: no memory is used again too early."""
    loader = BatchLoader(dataset, device=DEVICE)
    sums = []
    for _ in range(200):
        batch = loader.next(64)
        torch.cuda._sleep(200_000)
        sums.append(sum(tensor.double().sum() for tensor in batch))
        del batch
    torch.cuda.synchronize()
    loader.close()
    for number, total in enumerate(sums):
        right = sum(t.double().sum() for t in dataset.train_samples(64 * number, 64))
        assert total.item() == right.item()
