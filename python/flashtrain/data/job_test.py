"""Text that changes: its tokens are made again, or refused, and never pass for the new text's."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashtrain.data import DataError, identity, preparation
from flashtrain.data.chunks import CHUNK_CHARS
from flashtrain.data.job import enter
from flashtrain.data.manifest import read_manifest
from flashtrain.data.preparation import LOOK, prepare_source
from flashtrain.data.sources import parse_source
from flashtrain.data.token_files import open_split
from flashtrain.data.tokenizer import get_tokenizer

TEXTS = [f"{animal} live in house {n}. " * 50 for n in range(2) for animal in ("cats", "mice")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four JSON lines files of one document each, so four shards."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        write(folder, number, text)
    return folder


def write(folder: Path, number: int, text: str) -> None:
    (folder / f"{number}.jsonl").write_text(json.dumps({"text": text}) + "\n")


def prepare(corpus: Path, out: Path, field: str = "text") -> None:
    prepare_source(parse_source(f"jsonl:{corpus}/*.jsonl:{field}"), out, workers=1)


def words(out: Path) -> str:
    manifest = read_manifest(out)
    decode = get_tokenizer(manifest.tokenizer).decode
    return "".join(decode(open_split(out, manifest, split).tolist()) for split in manifest.splits)


@contextlib.contextmanager
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where the text's content is read to compare it."""

    def read(files: identity.Files) -> identity.Content:
        raise AssertionError("it was read")

    with monkeypatch.context() as patch:
        patch.setattr(identity, "read", read)
        yield


def test_the_same_text_elsewhere_or_touched_is_the_same(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(corpus, out)
    with no_reading(monkeypatch):
        prepare(corpus, out)
    os.utime(corpus / "1.jsonl", (1, 1))
    prepare(corpus, out)
    with no_reading(monkeypatch):  # it is remembered
        prepare(corpus, out)
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    prepare(moved, out)
    (out / LOOK).unlink()
    prepare(moved, out)
    shutil.rmtree(corpus)
    shutil.rmtree(moved)
    prepare(corpus, out)  # prepared data outlives its text
    with pytest.raises(DataError, match="holds 'jsonl:"):
        prepare(moved, out)


def test_another_text_is_noticed(corpus, tmp_path):
    out = tmp_path / "out"
    prepare(corpus, out)
    for edit, undo in ((TEXTS[1].replace("mice", "dogs"), TEXTS[1]), (TEXTS[1] + "more", TEXTS[1])):
        before = (corpus / "1.jsonl").stat()
        write(corpus, 1, edit)
        os.utime(corpus / "1.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(DataError, match="of files that were others or have changed since"):
            prepare(corpus, out)
        write(corpus, 1, undo)
        prepare(corpus, out)
    with pytest.raises(DataError, match="choose another folder with --out"):
        prepare(corpus, out, field="other")
    (corpus / "0.jsonl").rename(corpus / "9.jsonl")  # another order of documents
    with pytest.raises(DataError, match="have changed since"):
        prepare(corpus, out)


def test_older_folders_are_known_by_sizes(corpus, tmp_path):
    out = tmp_path / "out"
    prepare(corpus, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for key in ("sha256", "format", "field"):
        del manifest["source"][key]
    manifest["source"]["listing_sha256"] = "of names and sizes"
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / LOOK).unlink()
    prepare(corpus, out)
    write(corpus, 1, "longer or shorter")
    with pytest.raises(DataError, match="have changed since"):
        prepare(corpus, out)


def interrupted(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepares all chunks and stops before they are joined; returns their folder."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, out)
    return out.with_name(f".{out.name}.partial") / "chunks"


def test_shards_that_have_changed_since_a_run_was_stopped_are_read_again(
    corpus, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    chunks = interrupted(corpus, out, monkeypatch)
    stamps = {path.name: path.stat().st_mtime_ns for path in chunks.glob("*.chunk")}
    assert len(stamps) == 4
    write(corpus, 1, TEXTS[1].replace("mice", "dogs"))
    os.utime(corpus / "2.jsonl")
    interrupted(corpus, out, monkeypatch)
    now = {path.name: path.stat().st_mtime_ns for path in chunks.glob("*.chunk")}
    assert {name for name in stamps if stamps[name] != now[name]} == {"train-000001-000000.chunk"}
    prepare(corpus, out)
    assert words(out).count("dogs") == words(out).count("mice") == 50
    fresh = tmp_path / "fresh"
    prepare(corpus, fresh)
    assert (out / "train.bin").read_bytes() == (fresh / "train.bin").read_bytes()
    assert (out / "manifest.json").read_bytes() == (fresh / "manifest.json").read_bytes()


def test_files_that_change_while_they_are_read(corpus, tmp_path, monkeypatch):
    tokenize = preparation.tokenize
    texts = iter(["dogs live in house 0. " * 50])

    def edit_afterwards(*arguments):
        done = tokenize(*arguments)
        for text in texts:
            write(corpus, 1, text)
        return done

    monkeypatch.setattr(preparation, "tokenize", edit_afterwards)
    prepare(corpus, tmp_path / "out")
    assert words(tmp_path / "out").count("dogs") == 50
    texts = iter(map(str, range(1000)))

    def edit(*_: object) -> preparation.Done:
        write(corpus, 1, next(texts))
        return preparation.Done()

    monkeypatch.setattr(preparation, "tokenize", edit)
    with pytest.raises(DataError, match="its files change all the time; prepare a copy"):
        prepare(corpus, tmp_path / "out2")


def test_text_that_changes_after_its_tokens_were_joined_is_refused(corpus, tmp_path):
    partial = tmp_path / ".out.partial"
    source = parse_source(f"jsonl:{corpus}/*.jsonl:text")
    enter(partial, source, get_tokenizer("gpt2"), CHUNK_CHARS, print)
    (partial / "chunks" / "plan.json").write_text("[]")
    write(corpus, 1, "other text")
    with pytest.raises(DataError, match=r"\.out\.partial holds tokens of text that has changed"):
        prepare(corpus, tmp_path / "out")


def test_a_folder_of_the_users_under_our_name_is_left_alone(corpus, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"is where data is prepared, but holds 'thesis\.tex'"):
        prepare(corpus, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "thesis.tex").exists()
