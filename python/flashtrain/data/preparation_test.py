"""Prepared data: the bytes that the usual script writes, however it is prepared."""

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# Not the network, where `datasets` counts its users.
os.environ["HF_HUB_OFFLINE"] = "1"
import datasets

from flashtrain.data import DataError, GPT2Tokenizer, TokenDataset, load_dataset
from flashtrain.data.chunks import CHUNK_CHARS, encode, texts_of_chunks
from flashtrain.data.corpus import Texts
from flashtrain.data.manifest import read_manifest
from flashtrain.data.preparation import LOOK, prepare_source
from flashtrain.data.sources import parse_source
from flashtrain.data.token_files import (
    open_documents,
    open_split,
    verify_folder,
    write_token_files,
)

FILES = ("manifest.json", "train.bin", "train.documents.bin", "val.bin", "val.documents.bin")


def documents(count: int) -> list[str]:
    """Documents of 0 to some 60 words, and one of 2 MB."""
    draw = random.Random(5)
    words = ["To", " be,", " or", " not", "\n", " naïve", " 漢字", " 1606", "'s", "  ", "🎭"]
    texts = ["".join(draw.choices(words, k=draw.randrange(60))) for _ in range(count)]
    texts[count // 2] = "A long one. " * 180_000
    return texts


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = documents(6000)
    for number in range(3):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[number::3])
        (folder / f"{number}.jsonl").write_text(rows)
    return folder


def dataset_of(corpus_dir: Path) -> str:
    return f"jsonl:{corpus_dir}/*.jsonl:text"


@pytest.fixture(scope="module")
def prepared(corpus_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "prepared"
    prepare_source(parse_source(dataset_of(corpus_dir)), folder, workers=1)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    assert sorted(os.listdir(folder)) == sorted([*FILES, LOOK])
    return {name: (folder / name).read_bytes() for name in FILES}


def program_environment() -> dict[str, str]:
    """For a program that imports what this one does."""
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))


def test_the_same_bytes_as_the_usual_script(corpus_dir, prepared, tmp_path):
    """datasets' split with the published share and seed, tokens of each document, ends of text."""
    rows = datasets.load_dataset(
        "json",
        data_files=sorted(map(str, corpus_dir.glob("*.jsonl"))),
        split="train",
        cache_dir=str(tmp_path),
    ).filter(lambda row: row["text"])
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    tokenizer = GPT2Tokenizer()
    manifest = read_manifest(prepared)
    for ours, theirs in (("train", "train"), ("val", "test")):
        of_documents = [[*tokenizer.encode(text), 50256] for text in split[theirs]["text"]]
        expected = np.concatenate(of_documents)
        tokens = open_split(prepared, manifest, ours)
        assert tokens.dtype == np.uint16
        assert np.array_equal(tokens, expected)
        ends = open_documents(prepared, manifest, ours)
        assert ends is not None
        assert np.array_equal(ends, np.cumsum([len(d) for d in of_documents]))


def test_the_manifest(corpus_dir, prepared):
    manifest = read_manifest(prepared)
    assert (manifest.tokenizer, manifest.vocab_size, manifest.dtype) == ("gpt2", 50257, "uint16")
    assert manifest.tokenizer_sha256 == GPT2Tokenizer().sha256
    assert manifest.source["dataset"] == dataset_of(corpus_dir)
    assert manifest.source["files"] == 3
    counts = {name: s.documents.count for name, s in manifest.splits.items() if s.documents}
    num_documents = sum(map(bool, documents(6000)))
    assert counts == {"train": num_documents - 3, "val": 3}
    assert verify_folder(prepared) == manifest


@pytest.mark.parametrize(("workers", "chunk_chars"), [(2, 40_000), (3, 3000)])
def test_processes_and_chunks_do_not_show(corpus_dir, prepared, tmp_path, workers, chunk_chars):
    source = parse_source(dataset_of(corpus_dir))
    folder = tmp_path / "prepared"
    summary = prepare_source(source, folder, workers=workers, chunk_chars=chunk_chars)
    assert contents(folder) == contents(prepared)
    assert sorted(os.listdir(tmp_path)) == [".prepared.lock", "prepared"]
    assert summary.tokens == sum(s.tokens for s in read_manifest(folder).splits.values())
    assert summary.tokens_per_second_per_core
    again = prepare_source(source, folder, workers=workers)
    assert again.tokens_per_second_per_core is None
    assert (again.documents, again.tokens) == (summary.documents, summary.tokens)


def test_what_a_run_leaves_that_was_killed_at_its_very_end(corpus_dir, prepared, tmp_path):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    for name in ("chunks/plan.json", "chunks/train.tokens", "job.json"):
        path = tmp_path / ".prepared.partial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    prepare_source(parse_source(dataset_of(corpus_dir)), folder)
    assert contents(folder) == contents(prepared)
    assert not (tmp_path / ".prepared.partial").exists()


def test_what_a_run_leaves_that_was_killed_while_it_removed_the_rest(
    corpus_dir, prepared, tmp_path
):
    """The folder has been moved away since, and the text has changed."""
    source = parse_source(dataset_of(corpus_dir))
    partial = tmp_path / ".prepared.partial"
    (partial / "chunks").mkdir(parents=True)
    np.arange(6000).tofile(partial / "chunks" / "train.order")
    (partial / "chunks" / "train-000000.json").write_text('{"chunks": 0}')
    job = {
        "chunk_chars": CHUNK_CHARS,
        "source": source.description(),
        "tokenizer_sha256": GPT2Tokenizer().sha256,
    }
    (partial / "job.json").write_text(json.dumps(job))
    prepare_source(source, tmp_path / "prepared", workers=2)
    assert contents(tmp_path / "prepared") == contents(prepared)


# Until three programs have imported what they need, and then done their work, on a busy machine.
_AT_ONCE_SECONDS = 300


def _prepare_at_once(dataset: str, folder: Path, barrier) -> None:
    barrier.wait(timeout=_AT_ONCE_SECONDS)
    prepare_source(parse_source(dataset), folder, workers=2, chunk_chars=100_000)


def test_two_runs_at_once(corpus_dir, prepared, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    arguments = (dataset_of(corpus_dir), tmp_path / "prepared", barrier)
    runs = [context.Process(target=_prepare_at_once, args=arguments) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(timeout=2 * _AT_ONCE_SECONDS)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert contents(tmp_path / "prepared") == contents(prepared)


def test_text_that_is_not_cut_by_rows(tmp_path):
    """WikiText's lines are encoded one by one, follow each other without ends of text, and are one
    document; splits of the source stay as they are."""
    from flashtrain.data.sources import HubSource

    lines = {"train": ["", " = Title = \n", "", " A line . \n"], "validation": [" v \n"] * 2}
    for split, rows in lines.items():
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    source = HubSource("wikitext2", str(tmp_path), None, "text", end_of_text=False)
    prepare_source(source, tmp_path / "out", workers=1)
    tokenizer = GPT2Tokenizer()
    manifest = read_manifest(tmp_path / "out")
    for ours, theirs in (("train", "train"), ("val", "validation")):
        expected = [token for row in lines[theirs] for token in tokenizer.encode(row)]
        assert open_split(tmp_path / "out", manifest, ours).tolist() == expected
        assert np.array_equal(open_documents(tmp_path / "out", manifest, ours), [len(expected)])


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=20),
    chunk_chars=st.integers(1, 100),
    end_of_text=st.sampled_from([None, 50256]),
)
def test_chunks_join_to_the_documents(texts, chunk_chars, end_of_text):
    """The packer: every document that is not empty, in order, each followed by its end."""
    tokenizer = _TOKENIZER
    tokens: list[int] = []
    ends: list[int] = []
    for pieces in texts_of_chunks(Texts(tuple(texts)), chunk_chars):
        chunk = encode(pieces, tokenizer, end_of_text, np.dtype("<u2"))
        ends += [len(tokens) + end for end in chunk.ends.tolist()]
        tokens += chunk.tokens.tolist()
    end = [] if end_of_text is None else [end_of_text]
    expected = [tokenizer.encode(text) + end for text in texts if text]
    assert tokens == [token for document in expected for token in document]
    assert ends == np.cumsum([len(document) for document in expected], dtype=int).tolist()


_TOKENIZER = GPT2Tokenizer()


_PREPARE = """
import pathlib, sys
from flashtrain.data.preparation import LOOK, prepare_source
from flashtrain.data.sources import parse_source
prepare_source(parse_source(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=1)
"""


def peak_memory(session: int) -> dict[int, int]:
    """The most memory so far, in kilobytes, of each process of a session."""
    peaks = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", name, "stat").read_bytes()
            status = Path("/proc", name, "status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ends meanwhile
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        if peak and int(stat.rpartition(b")")[2].split()[3]) == session:
            peaks[int(name)] = int(peak[1])
    return peaks


def test_a_document_of_100_mb(tmp_path):
    """In 1 GB of memory for each process, its pages of libraries included."""
    text = "It is a long document. 漢\n" * (100 * 2**20 // 28)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("It is a short one.")
    command = [sys.executable, "-c", _PREPARE, f"text:{tmp_path}/*.txt", str(tmp_path / "out")]
    # The high-water mark that the system keeps of ended processes is no measure: it begins with
    # that of the process that started them, and knows nothing of what their helpers have started.
    run = subprocess.Popen(command, env=program_environment(), start_new_session=True)
    peaks: dict[int, int] = {}
    while run.poll() is None:
        peaks |= peak_memory(run.pid)
        time.sleep(0.02)
    assert run.returncode == 0
    manifest = read_manifest(tmp_path / "out")
    assert [s.documents and s.documents.count for s in manifest.splits.values()] == [1, 1]
    dataset_tokens = sum(split.tokens for split in manifest.splits.values())
    assert dataset_tokens > 30_000_000
    assert len(peaks) >= 5, peaks  # the program, its two helpers, a reader and an encoder
    assert max(peaks.values()) < 2**20, peaks


def test_too_few_documents(tmp_path):
    for number, text in enumerate(["", "one"]):
        (tmp_path / f"{number}.txt").write_text(text)
    with pytest.raises(DataError, match=r"takes 2 that are not empty, there are 1; cut"):
        prepare_source(parse_source(f"text:{tmp_path}/*.txt"), tmp_path / "out", workers=1)
    (tmp_path / "2.txt").write_text("two")  # nothing of the first attempt is in the way
    source = parse_source(f"text:{tmp_path}/[12].txt")
    assert prepare_source(source, tmp_path / "out2", workers=1).documents == 2


def test_other_data_in_the_folder_is_refused(corpus_dir, prepared, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"/prepared holds 'jsonl:.*; choose another folder with"):
        prepare_source(parse_source(f"text:{tmp_path}/*.txt"), prepared)
    grown = tmp_path / "grown"
    grown.mkdir()
    for path in corpus_dir.iterdir():
        (grown / path.name).write_bytes(path.read_bytes())
    source = parse_source(dataset_of(grown))
    prepare_source(source, tmp_path / "out", workers=1)
    with (grown / "0.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"of files that were others or have changed since"):
        prepare_source(source, tmp_path / "out")
    for path in grown.iterdir():  # prepared data outlives its text
        path.unlink()
    assert prepare_source(source, tmp_path / "out").tokens_per_second_per_core is None


_LIMITED = """
import resource, sys, pathlib
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
from flashtrain.data import DataError
from flashtrain.data.preparation import LOOK, prepare_source
from flashtrain.data.sources import parse_source
try:
    prepare_source(parse_source(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=2)
except DataError as error:
    sys.exit(f"error: {error}")
"""


def test_a_write_that_fails_is_one_line_and_loses_nothing(corpus_dir, prepared, tmp_path):
    """A limit on the size of files stands for a disk that is full: first for chunks, then for the
    joined file."""
    folder = tmp_path / "prepared"
    for limit in (100_000, 1_400_000):
        command = [sys.executable, "-c", _LIMITED, dataset_of(corpus_dir), str(folder), str(limit)]
        run = subprocess.run(
            command, env=program_environment(), capture_output=True, text=True, check=False
        )
        errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        assert run.returncode == 1, run.stderr
        assert len(errors) == 1, run.stderr
        assert "Traceback" not in run.stderr
        assert "cannot write to" in errors[0]
        assert "file system or `ulimit -f` allows; choose another folder" in errors[0]
        assert not folder.exists()
    prepare_source(parse_source(dataset_of(corpus_dir)), folder, workers=2)
    assert contents(folder) == contents(prepared)


def test_an_unreadable_file_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xff at offset 0"):
        prepare_source(parse_source(f"text:{tmp_path}/*.txt"), tmp_path / "out", workers=1)
    (tmp_path / "a.txt").write_text("better")
    summary = prepare_source(parse_source(f"text:{tmp_path}/*.txt"), tmp_path / "out", workers=1)
    assert summary.documents == 2


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"cannot write to .*file/out: .*not a folder; choose another"
    ):
        prepare_source(parse_source(f"text:{tmp_path}/*.txt"), tmp_path / "file" / "out")


def test_a_folder_that_others_made_is_taken_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    splits = {"train": np.arange(100), "val": np.arange(100)}
    for name, source in (("openwebtext", {}), ("wikitext2", {"name": "other"})):
        options = {"tokenizer": "gpt2", "vocab_size": 50257}
        write_token_files(tmp_path / name, splits, source=source, **options)  # type: ignore[arg-type]
    assert len(load_dataset(source="openwebtext", seq_len=8, seed=0).sources) == 1
    with pytest.raises(DataError, match=r"wikitext2 holds 'other', tokenizer gpt2; choose"):
        load_dataset(source="wikitext2", seq_len=8, seed=0)


def test_training_prepares_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    dataset = load_dataset(source="shakespeare_gpt2", seq_len=128, seed=0)
    assert isinstance(dataset, TokenDataset)
    assert dataset.sources[0].folder == tmp_path / "shakespeare_gpt2"
    splits = read_manifest(tmp_path / "shakespeare_gpt2").splits
    assert {name: split.tokens for name, split in splits.items()} == {
        "train": 1_485_554,
        "val": 63_608,
    }
    assert splits["train"].sha256 == (
        "e455a7cfb76a13164bf7dae3fd1a4e541dd82147944610da818682d440c1808c"
    )
