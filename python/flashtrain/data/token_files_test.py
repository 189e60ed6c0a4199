"""Prepared data on disk: written whole or not at all, read back as it was, refused when damaged."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtrain import files
from flashtrain.data import DataError, TokenDataset, token_files
from flashtrain.data.manifest import Manifest, read_manifest
from flashtrain.data.token_files import (
    open_documents,
    open_split,
    remove_abandoned,
    verify_folder,
    write_token_files,
)

TRAIN, VAL = np.arange(1000) % 256, np.arange(100)[::-1] % 256


def write(folder: Path, vocab_size: int = 256, train: np.ndarray = TRAIN) -> None:
    write_token_files(
        folder,
        {"train": train, "val": VAL},
        tokenizer="bytes",
        vocab_size=vocab_size,
        source={"name": "test"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "prepared")
    return tmp_path / "prepared"


def message(folder: Path) -> str:
    """The one line that opening a damaged folder is answered with."""
    with pytest.raises(DataError) as caught:
        open_split(folder, read_manifest(folder), "train")
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def test_round_trip(folder):
    manifest = read_manifest(folder)
    assert manifest.tokenizer == "bytes"
    assert manifest.vocab_size == 256
    assert manifest.dtype == "uint16"
    assert manifest.source == {"name": "test"}
    for name, expected in (("train", TRAIN), ("val", VAL)):
        tokens = open_split(folder, manifest, name, verify=True)
        assert np.array_equal(tokens, expected)
        assert not tokens.flags.writeable
    assert (folder / "train.bin").read_bytes() == TRAIN.astype("<u2").tobytes()
    assert sorted(os.listdir(folder)) == ["manifest.json", "train.bin", "val.bin"]


def test_documents(folder, tmp_path):
    assert open_documents(folder, read_manifest(folder), "train") is None  # as of older folders
    ends = {"train": np.array([400, 1000]), "val": np.array([100])}
    splits = {"train": TRAIN, "val": VAL}
    options: dict[str, Any] = {"tokenizer": "bytes", "vocab_size": 256, "source": {}}
    write_token_files(tmp_path / "x", splits, ends=ends, **options)
    manifest = verify_folder(tmp_path / "x")
    documents = manifest.splits["train"].documents
    assert documents is not None
    assert documents.count == 2
    assert Manifest.from_json(manifest.to_json()) == manifest
    for name, expected in ends.items():
        assert np.array_equal(open_documents(tmp_path / "x", manifest, name), expected)
    write_token_files(tmp_path / "y", splits, ends={**ends, "val": np.array([99])}, **options)
    with pytest.raises(DataError, match="its last document ends at 99, not at its 100 tokens"):
        verify_folder(tmp_path / "y")
    (tmp_path / "x" / "train.documents.bin").write_bytes(bytes(16))
    with pytest.raises(DataError, match=r"train\.documents\.bin is damaged"):
        verify_folder(tmp_path / "x")


def test_large_vocabularies_take_four_bytes(tmp_path):
    for vocab_size, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        folder = tmp_path / dtype
        write(folder, vocab_size, train=np.array([0, vocab_size - 1]))
        manifest = read_manifest(folder)
        assert manifest.dtype == dtype
        assert open_split(folder, manifest, "train").tolist() == [0, vocab_size - 1]


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    for bad in (256, -1):
        with pytest.raises(ValueError, match=f"token {bad}, outside the vocabulary of 256"):
            write(tmp_path / "prepared", train=np.array([0, bad, 1]))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def fail_at_the_second_file(path, data):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(files, "write", fail_at_the_second_file)
    with pytest.raises(
        DataError, match=r"cannot write .*/prepared: the disk is full; free space there; choose"
    ):
        write(tmp_path / "prepared")
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    fsynced, write_file = [], files.write

    def watch(path, data):
        assert not (tmp_path / "prepared").exists()
        write_file(path, data)
        fsynced.append(path.name)

    monkeypatch.setattr(files, "write", watch)
    write(tmp_path / "prepared")
    assert fsynced == ["train.bin", "val.bin", "manifest.json"]
    assert os.listdir(tmp_path) == ["prepared"]


def test_a_folder_that_exists_is_left_as_it_is(folder):
    before = (folder / "train.bin").stat().st_mtime_ns
    write(folder, train=TRAIN[:10])
    assert (folder / "train.bin").stat().st_mtime_ns == before
    assert read_manifest(folder).splits["train"].tokens == 1000


def _die_at_the_second_file(folder: Path) -> None:
    written = []

    def die(path, data):
        written.append(path)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        path.write_bytes(data)

    files.write = die
    write(folder)


@pytest.mark.parametrize("done", [False, True])
def test_what_a_killed_writer_leaves_goes(tmp_path, done):
    folder = tmp_path / "prepared"
    writer = multiprocessing.get_context("fork").Process(
        target=_die_at_the_second_file, args=(folder,)
    )
    writer.start()
    writer.join(timeout=120)
    assert writer.exitcode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".prepared.writing-")
    if done:  # by another process
        folder.mkdir()
        (folder / "manifest.json").touch()
        remove_abandoned(folder)
    else:
        write(folder)
    assert os.listdir(tmp_path) == ["prepared"]


def test_what_a_writer_is_at_work_on_stays(tmp_path, monkeypatch):
    write_file = files.write

    def watch(path, data):
        remove_abandoned(tmp_path / "prepared")
        write_file(path, data)

    monkeypatch.setattr(files, "write", watch)
    write(tmp_path / "prepared")
    assert os.listdir(tmp_path) == ["prepared"]


def _write_at_once(folder: Path, barrier) -> None:
    barrier.wait(timeout=120)
    write(folder)


def test_concurrent_writers_do_not_harm_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder, barrier = tmp_path / str(attempt) / "prepared", context.Barrier(4)
        writers = [context.Process(target=_write_at_once, args=(folder, barrier)) for _ in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(timeout=120)
        assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
        assert np.array_equal(open_split(folder, read_manifest(folder), "train"), TRAIN)
        assert os.listdir(folder.parent) == ["prepared"]


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write prepared data to .*file/prepared"):
        write(tmp_path / "file" / "prepared")


def test_missing_files(tmp_path, folder):
    assert "no such folder" in message(tmp_path / "nowhere")
    (folder / "train.bin").unlink()
    assert "cannot read" in message(folder)
    (folder / "manifest.json").unlink()
    assert "it has no manifest.json" in message(folder)


def test_truncated_file(folder):
    os.truncate(folder / "train.bin", 1998)
    text = message(folder)
    assert "train.bin holds 1,998 bytes, the manifest says 2,000" in text
    assert f"move {folder} away and prepare the data again" in text


def test_flipped_bit(folder):
    data = bytearray((folder / "train.bin").read_bytes())
    data[1234] ^= 1
    (folder / "train.bin").write_bytes(data)
    assert "train.bin is damaged" in message(folder)


def test_large_files_are_verified_on_demand(folder, monkeypatch):
    monkeypatch.setattr(token_files, "VERIFY_AT_LOAD_BYTES", 100)
    data = bytearray((folder / "train.bin").read_bytes())
    data[1234] ^= 1
    (folder / "train.bin").write_bytes(data)
    manifest = read_manifest(folder)
    assert len(open_split(folder, manifest, "train")) == 1000
    with pytest.raises(DataError, match=r"train\.bin is damaged"):
        open_split(folder, manifest, "train", verify=True)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[]", 'has no "format": "flashtrain-tokens"'),
        (lambda text: text.replace("flashtrain-tokens", "other"), 'has no "format"'),
        (lambda text: text.replace('"version": 1', '"version": 9'), "has format version 9"),
        (lambda text: text.replace("uint16", "float8"), "has dtype 'float8', supported: uint16"),
        (lambda text: text.replace('"vocab_size"', '"words"'), "lacks or garbles a field"),
        (lambda text: text.replace('"vocab_size": 256', '"vocab_size": -1'), "lacks or garbles"),
        (lambda text: text.replace('"tokens": 1000', '"tokens": "many"'), "lacks or garbles"),
        (lambda text: text.replace('"splits"', '"parts"'), "lacks or garbles a field"),
        (lambda text: text.replace('"val":', '"test":'), "lacks the split 'val'"),
        (lambda text: text.replace("train.bin", "../train.bin"), "not the name of a file in its"),
        (lambda text: text.replace('"tokens": 1000', '"tokens": ' + "9" * 5000), "is not JSON"),
        (lambda text: text.replace('"tokens": 1000', f'"tokens": {10**30}'), "'tokens' is 1000000"),
        (lambda text: text.replace('"tokens": 1000', '"tokens": 1000.0'), "'tokens' is 1000.0"),
        (lambda text: text.replace('"tokens": 1000', '"tokens": true'), "'tokens' is True, not a"),
        (lambda text: text.replace('"file": "val.bin"', '"file": 3'), "'file' is 3, not a string"),
        (lambda text: text.replace('"sha256": "', '"sha256": "x'), "not a SHA-256 in hexadecimal"),
        (lambda text: text.replace('"bytes"', "[]"), "'tokenizer' is [], not a string"),
        (
            lambda text: text.replace('{\n    "name"', "[" * 900 + "]" * 900 + ',"x": {"n"'),
            "an object",
        ),
        (lambda text: '{"a":' * 10**5 + "1" + "}" * 10**5, "it is nested too deeply"),
        (lambda text: text.replace('"test"', "[" * 900 + "]" * 900), "it is nested too deeply"),
        (
            lambda text: text.replace(": 256", ": 70000"),
            "70,000 tokens, more than its dtype uint16",
        ),
        (lambda text: text.replace("{", "{" + " " * 2**24, 1), "more than 16,777,216 bytes"),
    ],
)
def test_damaged_manifests(folder, edit, complaint):
    path = folder / "manifest.json"
    edited = edit(path.read_text())
    assert edited != path.read_text()
    path.write_text(edited)
    assert complaint in message(folder)


def test_manifest_that_is_no_text(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "manifest.json is not UTF-8" in message(folder)


def test_manifest_round_trip(folder):
    manifest = read_manifest(folder)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["version"] == 1


def rewrite(folder: Path, **fields: Any) -> None:
    """Changes fields of a manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["manifest.json", "train.bin"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_only_regular_files_are_opened(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert f"{path} is {kind}, not a regular file" in message(folder)


@pytest.mark.parametrize("verify", [False, True])
def test_tokens_outside_the_vocabulary_are_found(folder, monkeypatch, verify):
    """When a small file is opened, and before a batch of a large one is used."""
    rewrite(folder, vocab_size=200)
    if not verify:
        monkeypatch.setattr(token_files, "VERIFY_AT_LOAD_BYTES", 100)
    complaint = r"train\.bin holds token 2\d\d, outside its vocabulary of 200"
    if verify:
        with pytest.raises(DataError, match=complaint):
            open_split(folder, read_manifest(folder), "train")
    else:
        dataset = TokenDataset(folder, seq_len=8, seed=0)
        with pytest.raises(DataError, match=complaint):
            dataset.train_batch(0, dataset.num_train_windows)


def test_documents_in_no_order_are_found(tmp_path, monkeypatch):
    splits = {"train": TRAIN, "val": VAL}
    ends = {"train": np.array([900, 400, 1000]), "val": np.array([100])}
    options: dict[str, Any] = {"tokenizer": "bytes", "vocab_size": 256, "source": {}}
    write_token_files(tmp_path / "x", splits, ends=ends, **options)
    with pytest.raises(DataError, match=r"train\.documents\.bin: its documents are in no order"):
        TokenDataset(tmp_path / "x", seq_len=999, seed=0, document_mask=True)
    monkeypatch.setattr(token_files, "VERIFY_AT_LOAD_BYTES", 10)
    dataset = TokenDataset(tmp_path / "x", seq_len=999, seed=0, document_mask=True)
    with pytest.raises(DataError, match="the documents of 'train' are in no order"):
        dataset.train_batch(0, 1)


def test_an_existing_folder_is_filled_if_it_is_empty(tmp_path):
    folder = tmp_path / "mount"
    (folder / "lost+found").mkdir(parents=True)
    (folder / ".hidden").touch()
    write(folder)
    assert np.array_equal(open_split(folder, read_manifest(folder), "train"), TRAIN)
    names = [".hidden", "lost+found", "manifest.json", "train.bin", "val.bin"]
    assert sorted(os.listdir(folder)) == names
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(
        DataError, match=r"home holds other files .*'thesis\.tex'\); choose another"
    ):
        write(tmp_path / "home")
