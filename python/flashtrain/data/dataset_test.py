"""The order of training: a pure function of dataset, seed, step and global batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flashtrain.data import ByteTokenizer, DataError, TokenDataset, get_tokenizer, load_dataset
from flashtrain.data.token_files import write_token_files

SEQ_LEN = 8
NUM_WINDOWS = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training tokens 0, 1, 2, ...: a window's first token tells which window it is."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    write_token_files(
        folder,
        {"train": np.arange(NUM_WINDOWS * SEQ_LEN + 5), "val": np.arange(1000, 1000 + 30)},
        tokenizer="bytes",
        vocab_size=2000,
        source={},
    )
    return folder


@pytest.fixture
def dataset(folder) -> TokenDataset:
    return TokenDataset(folder, seq_len=SEQ_LEN, seed=7)


def windows_of(tokens: torch.Tensor) -> list[int]:
    assert (tokens[:, 0] % SEQ_LEN == 0).all()
    return (tokens[:, 0] // SEQ_LEN).tolist()


def test_batches_are_windows_and_their_successors(dataset):
    tokens, targets = dataset.train_batch(3, 4)
    assert tokens.shape == targets.shape == (4, SEQ_LEN)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(SEQ_LEN))


def test_an_epoch_sees_every_window_once(dataset):
    assert dataset.num_train_windows == NUM_WINDOWS
    seen = [w for step in range(5) for w in windows_of(dataset.train_batch(step, 5)[0])]
    assert sorted(seen) == list(range(NUM_WINDOWS))
    assert seen != sorted(seen)


def test_epochs_differ_and_batches_may_straddle_them(dataset):
    # 25 windows in batches of 10: steps 0-4 are two epochs, step 2 is half in each
    seen = [w for step in range(5) for w in windows_of(dataset.train_batch(step, 10)[0])]
    first, second = seen[:NUM_WINDOWS], seen[NUM_WINDOWS:]
    assert sorted(first) == sorted(second) == list(range(NUM_WINDOWS))
    assert first != second


def test_a_batch_may_be_larger_than_an_epoch(dataset):
    seen = windows_of(dataset.train_batch(0, 3 * NUM_WINDOWS)[0])
    assert np.bincount(seen).tolist() == [3] * NUM_WINDOWS


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_ranks_share_a_step_as_one_rank_has_it(dataset, world_size):
    for step in (0, 1, 2, 1000):
        whole = dataset.train_batch(step, 12)
        slices = [
            dataset.train_batch(step, 12, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for i in range(2):
            assert torch.equal(torch.cat([s[i] for s in slices]), whole[i])


def test_the_order_does_not_depend_on_history(folder, dataset):
    for step in range(5):
        dataset.train_batch(step, 4)
    fresh = TokenDataset(folder, seq_len=SEQ_LEN, seed=7)
    assert torch.equal(fresh.train_batch(5, 4)[0], dataset.train_batch(5, 4)[0])


def test_the_global_batch_size_only_groups_the_samples(dataset):
    one_by_one = [dataset.train_batch(step, 1)[0] for step in range(40)]
    assert torch.equal(torch.cat(one_by_one), dataset.train_batch(0, 40)[0])


def test_seeds_differ(folder, dataset):
    other = TokenDataset(folder, seq_len=SEQ_LEN, seed=8)
    assert not torch.equal(other.train_batch(0, 25)[0], dataset.train_batch(0, 25)[0])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_validation_covers_every_token_once(dataset, batch_size, world_size):
    targets_seen = []
    for rank in range(world_size):
        for tokens, targets in dataset.val_batches(batch_size, rank=rank, world_size=world_size):
            assert tokens.shape == targets.shape
            assert len(tokens) <= batch_size
            assert torch.equal(targets, tokens + 1)
            targets_seen += targets.flatten().tolist()
    assert sorted(targets_seen) == list(range(1001, 1030))


def test_validation_is_in_order(dataset):
    first = next(iter(dataset.val_batches(2)))[0]
    assert first[:, 0].tolist() == [1000, 1008]


def test_a_dataset_smaller_than_a_window_is_refused(folder):
    with pytest.raises(DataError, match=r"205 training tokens, fewer than a window .* = 206"):
        TokenDataset(folder, seq_len=205, seed=0)
    assert TokenDataset(folder, seq_len=204, seed=0).num_train_windows == 1


def test_unusable_arguments_are_refused(folder, dataset):
    for arguments, message in [
        ({"step": -1, "global_batch_size": 4}, "step=-1"),
        ({"step": 0, "global_batch_size": 0}, "global_batch_size=0"),
        ({"step": 0, "global_batch_size": 4, "rank": 2, "world_size": 2}, "rank=2"),
        ({"step": 0, "global_batch_size": 5, "world_size": 2}, "not a multiple of world_size=2"),
    ]:
        with pytest.raises(DataError, match=message):
            dataset.train_batch(**arguments)
    with pytest.raises(DataError, match="seq_len=0"):
        TokenDataset(folder, seq_len=0, seed=0)
    with pytest.raises(DataError, match="seed=-1"):
        TokenDataset(folder, seq_len=8, seed=-1)


def test_paths_are_relative_to_the_users_folder(folder, monkeypatch):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(folder.parent))
    assert load_dataset("prepared", seq_len=SEQ_LEN, seed=7).folder == folder
    monkeypatch.delenv("BUILD_WORKING_DIRECTORY")
    monkeypatch.chdir(folder.parent)
    assert load_dataset("prepared", seq_len=SEQ_LEN, seed=7).folder == folder


def test_sources_without_prepared_data_say_where_they_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_dataset("", source="openwebtext", seq_len=8, seed=0)
    text = str(caught.value)
    assert str(tmp_path / "openwebtext" / "manifest.json") in text
    assert "--config.data.path" in text
    assert "\n" not in text
    with pytest.raises(DataError, match=r"'openwebtxt' is unknown; did you mean 'openwebtext'"):
        load_dataset(source="openwebtxt", seq_len=8, seed=0)
    with pytest.raises(DataError, match=r"neither data\.path nor data\.source"):
        load_dataset(seq_len=8, seed=0)
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(tmp_path / "nowhere", source="shakespeare", seq_len=8, seed=0)


def test_the_default_cache_is_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    with pytest.raises(DataError, match=str(tmp_path / "data" / "the_pile")):
        load_dataset(source="the_pile", seq_len=8, seed=0)


def test_an_unknown_tokenizer_is_refused_before_training(tmp_path):
    splits = {"train": np.arange(100), "val": np.arange(100)}
    write_token_files(tmp_path / "x", splits, tokenizer="words", vocab_size=100, source={})
    with pytest.raises(DataError, match="no tokenizer 'words'; supported: bytes"):
        TokenDataset(tmp_path / "x", seq_len=8, seed=0)


def test_byte_tokenizer():
    tokenizer = get_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    for text in ("", "To be", "naïve — 漢字 🎭\n\0"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([72, 0xC3, 105, 256, 50256]) == "H\ufffdi\ufffd\ufffd"
    with pytest.raises(DataError, match="no tokenizer 'gpt2'; supported: bytes"):
        get_tokenizer("gpt2")
