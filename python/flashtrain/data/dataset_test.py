"""The order of training: a pure function of dataset, seed, step and global batch."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashtrain.data import (
    ByteTokenizer,
    DataError,
    TokenDataset,
    describe_samples,
    get_tokenizer,
    load_dataset,
)
from flashtrain.data.dataset import Part
from flashtrain.data.interleave import PERIOD
from flashtrain.data.token_files import write_token_files

SEQ_LEN = 8
NUM_WINDOWS = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training tokens 0, 1, 2, ...: a window's first token identifies the window."""
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
        ({"step": 0, "global_batch_size": 5, "world_size": 2}, "5 samples are not a multiple"),
    ]:
        with pytest.raises(DataError, match=message):
            dataset.train_batch(**arguments)
    with pytest.raises(DataError, match="seq_len=0"):
        TokenDataset(folder, seq_len=0, seed=0)
    with pytest.raises(DataError, match="seed=-1"):
        TokenDataset(folder, seq_len=8, seed=-1)


def test_paths_are_relative_to_the_users_folder(folder, monkeypatch):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(folder.parent))
    assert load_dataset("prepared", seq_len=SEQ_LEN, seed=7).sources[0].folder == folder
    monkeypatch.delenv("BUILD_WORKING_DIRECTORY")
    monkeypatch.chdir(folder.parent)
    assert load_dataset("prepared", seq_len=SEQ_LEN, seed=7).sources[0].folder == folder


def test_sources_that_cannot_be_prepared_say_why(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"'openwebtxt' is unknown; did you mean 'openwebtext'"):
        load_dataset(source="openwebtxt", seq_len=8, seed=0)
    with pytest.raises(DataError, match=rf"no file matches {tmp_path}/the_pile_shards/train/"):
        load_dataset("", source="the_pile", seq_len=8, seed=0)
    with pytest.raises(DataError, match=r"neither data\.path nor data\.source"):
        load_dataset(seq_len=8, seed=0)
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(tmp_path / "nowhere", source="shakespeare", seq_len=8, seed=0)


def test_an_unknown_tokenizer_is_refused_before_training(tmp_path):
    splits = {"train": np.arange(100), "val": np.arange(100)}
    write_token_files(tmp_path / "x", splits, tokenizer="words", vocab_size=100, source={})
    with pytest.raises(DataError, match="no tokenizer 'words'; supported: bytes, gpt2"):
        TokenDataset(tmp_path / "x", seq_len=8, seed=0)


def test_byte_tokenizer():
    tokenizer = get_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    for text in ("", "To be", "naïve — 漢字 🎭\n\0"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([72, 0xC3, 105, 256, 50256]) == "H\ufffdi\ufffd\ufffd"
    assert tokenizer.encode_to_array("Aé").tolist() == [65, 0xC3, 0xA9]


def test_samples_are_numbered_through_the_run(dataset):
    first = dataset.train_samples(6, 4)[0]
    assert torch.equal(first, dataset.train_batch(0, 10)[0][6:])
    assert torch.equal(first[2:], dataset.train_samples(6, 4, rank=1, world_size=2)[0])
    for arguments in ((-1, 4), (0, 0)):
        with pytest.raises(DataError, match=r"must be at least 0|not a multiple"):
            dataset.train_samples(*arguments)


# ---- documents -----------------------------------------------------------------------------------


def write_documents(folder: Path, lengths: list[int], first: int = 0) -> np.ndarray:
    """Each token is the number of its document, counted from `first`; returns the tokens."""
    tokens = np.repeat(first + np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)
    write_token_files(
        folder,
        {"train": tokens, "val": tokens},
        ends={"train": ends, "val": ends},
        tokenizer="bytes",
        vocab_size=first + len(lengths) + 1,
        source={},
    )
    return tokens


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=60),
    seq_len=st.integers(1, 30),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_documents_of_windows(tmp_path_factory, lengths, seq_len, world_size):
    folder = tmp_path_factory.mktemp("data") / "prepared"
    if sum(lengths) <= seq_len:
        lengths = [seq_len + 1, *lengths]
    write_documents(folder, lengths)
    dataset = TokenDataset(folder, seq_len=seq_len, seed=5, document_mask=True)
    batches = [dataset.train_batch(3, 4, rank=r, world_size=world_size) for r in range(world_size)]
    for batch in [*batches, *dataset.val_batches(3)]:
        tokens, targets, documents, positions = batch
        assert documents.dtype == torch.int32
        assert positions.dtype == torch.int64
        columns, length = documents.shape[1], tokens.shape[1]
        assert columns >= 8
        assert columns & (columns - 1) == 0
        assert positions.shape == tokens.shape == targets.shape
        for row in range(len(tokens)):
            # A document begins where the token, which is its number, changes.
            changes = (tokens[row, 1:] != tokens[row, :-1]).nonzero()[:, 0] + 1
            starts = [0, *changes.tolist()]
            assert documents[row].tolist() == starts + [length] * (columns - len(starts))
            begins = [max(s for s in starts if s <= t) for t in range(length)]
            assert positions[row].tolist() == [t - b for t, b in enumerate(begins)]


def test_masks_need_documents(folder):
    with pytest.raises(DataError, match=r"data\.document_mask needs .* has no index of documents"):
        TokenDataset(folder, seq_len=SEQ_LEN, seed=0, document_mask=True)


def test_samples_are_described(tmp_path, folder):
    write_documents(tmp_path / "x", [3, 20, 30], first=65)
    dataset = TokenDataset(tmp_path / "x", seq_len=8, seed=5)
    _, windows = dataset.locate(np.arange(6))
    lines = describe_samples(dataset, range(6))
    first = windows.tolist().index(0)
    assert lines[first] == (
        f"sample {first}: x window 0, tokens 0 to 8, documents 0 to 1: 'AAABBBBBCCCCCCCC'"
    ).replace("CCCCCCCC", "B" * 15 + "C" * 9)
    assert "document 2:" in lines[windows.tolist().index(4)]
    no_index = TokenDataset(folder, seq_len=SEQ_LEN, seed=7)
    assert re.match(
        r"sample 9: prepared window \d+, tokens \d+ to \d+: '", describe_samples(no_index, [9])[0]
    )


# ---- mixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> TokenDataset:
    """Two folders, 3 to 1; tokens of the second are at least 100."""
    root = tmp_path_factory.mktemp("mixture")
    write_documents(root / "a", [7] * 50)
    write_documents(root / "b", [9] * 30, first=100)
    parts = [Part(root / "a", 3.0), Part(root / "b", 1.0)]
    return TokenDataset(parts, seq_len=SEQ_LEN, seed=7)


def test_a_mixture_holds_each_source_by_its_weight(mixture):
    tokens = mixture.train_samples(0, 2 * PERIOD)[0]
    assert ((tokens[:, 0] >= 100).sum() == 2 * PERIOD // 4).item()
    # Each source is read in its own epochs, every window equally often up to the last epoch.
    sources, windows = mixture.locate(np.arange(2 * PERIOD))
    for number, source in enumerate(mixture.sources):
        counts = np.bincount(windows[sources == number], minlength=source.num_windows)
        assert counts.max() - counts.min() <= 1
    assert mixture.vocab_size == 131


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_a_mixture_as_one_rank_has_it(mixture, world_size):
    whole = mixture.train_samples(4000, 200)
    shares = [
        mixture.train_samples(4000, 200, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert torch.equal(torch.cat([share[0] for share in shares]), whole[0])


def test_validation_covers_all_sources(mixture):
    for world_size in (1, 3):
        targets = torch.cat(
            [
                batch[1].flatten()
                for rank in range(world_size)
                for batch in mixture.val_batches(4, rank=rank, world_size=world_size)
            ]
        )
        assert len(targets) == 50 * 7 - 1 + 30 * 9 - 1


def test_a_mixture_has_one_tokenizer(tmp_path, folder):
    splits = {"train": np.arange(100), "val": np.arange(100)}
    write_token_files(tmp_path / "x", splits, tokenizer="gpt2", vocab_size=50257, source={})
    with pytest.raises(DataError, match=r"x has the tokenizer 'gpt2', but .* has 'bytes'"):
        TokenDataset([Part(folder, 1.0), Part(tmp_path / "x", 1.0)], seq_len=8, seed=0)
    for weight, complaint in (
        (1e-6, "at least 1/4096"),
        (np.inf, "positive"),
        (np.nan, "positive"),
    ):
        with pytest.raises(DataError, match=rf"data\.source: weights=.* must be {complaint}"):
            TokenDataset([Part(folder, 1.0), Part(folder, weight)], seq_len=8, seed=0)


def test_the_fingerprint_is_of_what_is_read(tmp_path, mixture):
    def fingerprint(*folders: Path, weights: tuple[float, ...] = (1.0, 3.0), **options) -> str:
        parts = [Part(folder, weight) for folder, weight in zip(folders, weights)]
        return TokenDataset(parts, seq_len=8, seed=0, **options).fingerprint

    a, b = (source.folder for source in mixture.sources)
    copy = tmp_path / "another name"
    shutil.copytree(a, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["source"] = {"name": "as others call it"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert fingerprint(a) == fingerprint(copy) != fingerprint(b)
    assert fingerprint(a, b) == fingerprint(copy, b, weights=(0.5, 1.5))
    different = [fingerprint(a, b, weights=(1.0, 1.0)), fingerprint(b, a), fingerprint(a)]
    assert len({fingerprint(a, b), fingerprint(a, document_mask=True), *different}) == 5
