"""Preparing data: what users of other projects have reported, held against ours."""

import errno
import gzip
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from experiments import prepare_data
from flashtrain.data import DataError
from flashtrain.data.corpus import JsonLines, Shard, TextFiles
from flashtrain.data.manifest import read_manifest
from flashtrain.data.sources import prepare
from flashtrain.data.token_files import open_documents, open_split
from flashtrain.data.tokenizer import get_tokenizer
from flashtrain.train import launcher


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Three documents as the description of a dataset."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    return f"text:{tmp_path}/*.txt"


def documents(folder: Path) -> list[str]:
    """The documents of prepared data, sorted; each ends with an end-of-text token of its own."""
    manifest, tokenizer, found = read_manifest(folder), get_tokenizer("gpt2"), []
    for split in ("val", "train"):
        tokens, ends = open_split(folder, manifest, split), open_documents(folder, manifest, split)
        assert ends is not None
        for first, end in zip([0, *ends.tolist()], ends.tolist()):
            assert tokens[end - 1] == 50256
            assert 50256 not in tokens[first : end - 1]
            found.append(tokenizer.decode(tokens[first : end - 1].tolist()))
    return sorted(found)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(corpus, tmp_path, monkeypatch, code):
    """huggingface/datasets#329, python-poetry/poetry#8825: Lustre without -o flock, some NFS."""

    def no_flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_flock)
    assert prepare(corpus, tmp_path / "out", workers=1).documents == 3
    assert prepare("shakespeare", tmp_path / "shakespeare").documents == 42
    assert {p.name for p in tmp_path.glob(".*")} == {".out.lock"}  # nothing half done is left


def test_a_file_system_that_cannot_fsync_folders(corpus, tmp_path, monkeypatch):
    """pytorch/pytorch#144752, untitaker/python-atomicwrites#28: CIFS and FUSE give EINVAL."""
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert prepare(corpus, tmp_path / "out", workers=1).documents == 3
    assert prepare("shakespeare", tmp_path / "shakespeare").documents == 42


@pytest.mark.parametrize("name", ["pile [v2]", "pile*", "what?", "a=b:c\nd", "\udcff\udcfe"])
def test_a_folder_whose_name_is_a_pattern(tmp_path, monkeypatch, name):
    """huggingface/datasets#7468: what is a folder for the user is no glob for us."""
    folder = tmp_path / name / "the_pile_shards"
    (folder / "train").mkdir(parents=True)
    for file in ("train/00.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
        (folder / file).write_bytes(zstandard.compress(lines.encode()))
    assert prepare(f"the_pile:{folder}", tmp_path / "out", workers=1).documents == 6
    monkeypatch.setenv("DATA_DIR", str(tmp_path / name))
    summary = prepare("the_pile", workers=1)
    assert summary.manifest == str(tmp_path / name / "the_pile" / "manifest.json")
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(folder))
    assert prepare("jsonl:train/*.zst:text", tmp_path / "out2", workers=1).documents == 2


@pytest.mark.parametrize("new", ["all about dogs", "all about elephants"])
def test_a_corpus_that_was_edited(tmp_path, new):
    """huggingface/datasets#2956: the old data was used without a word."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("all about cats")
    prepare(f"text:{tmp_path}/*.txt", tmp_path / "out", workers=1)
    (tmp_path / "1.txt").write_text(new)
    with pytest.raises(DataError, match="of files that were others or have changed since"):
        prepare(f"text:{tmp_path}/*.txt", tmp_path / "out", workers=1)


def test_byte_order_marks_are_no_text(tmp_path):
    """NVDLI/LDL#3 (text), langchain-ai/langchain-community#138 (JSON): Windows editors."""
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"\xef\xbb\xbfHello\r\n")
    lines.write_bytes(b'\xef\xbb\xbf{"text": "Hello"}\r\n{"text": "Bye"}\r\n')
    shards: list[tuple[Shard, list[str]]] = [
        (TextFiles((text,)), ["Hello\r\n"]),
        (JsonLines(lines, "text"), ["Hello", "Bye"]),
    ]
    for shard, expected in shards:
        assert [piece.text for piece in shard.pieces()] == expected


def test_an_output_folder_that_exists(corpus, tmp_path):
    """apache/uniffle#571: an empty one is a mount point (docker -v), and is filled; of one with the
    user's files nobody says to delete it."""
    for name in ("empty", "shakespeare", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    assert prepare(corpus, tmp_path / "empty", workers=1).documents == 3
    assert len(documents(tmp_path / "empty")) == 3
    assert prepare("shakespeare", tmp_path / "shakespeare").documents == 42
    for dataset in (corpus, "shakespeare"):
        with pytest.raises(
            DataError, match=r"holds other files .* choose another folder"
        ) as caught:
            prepare(dataset, tmp_path / "home", workers=1)
        assert "delete" not in str(caught.value)
        assert "remove" not in str(caught.value)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["./corpus", "corpus"])
def test_a_relative_folder_under_bazel_run(tmp_path, monkeypatch, name):
    """bazelbuild/bazel#3325: the program is started elsewhere, paths mean the user's folder."""
    user, runfiles = tmp_path / "user", tmp_path / "runfiles"
    (user / "corpus").mkdir(parents=True)
    runfiles.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three"))
    (user / "corpus" / "train.jsonl").write_text(lines)
    monkeypatch.chdir(runfiles)
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(user))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert prepare(f"hf:{name}", user / "out", workers=1).documents == 3
    (user / "corpus" / "train.jsonl").write_text(lines.replace("two", "six"))
    with pytest.raises(DataError, match="have changed since"):
        prepare(f"hf:{name}", user / "out", workers=1)


def test_lines_that_break_readers(tmp_path):
    """NVIDIA/Megatron-LM#62 (an empty first document), and what crawls hold: what cannot be used is
    named by file and line, and nothing else is blamed."""
    good = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    for number, line in enumerate(
        ['{"text": ""}', "\n \r", '{"text": "x", "id": ' + "1" * 5000 + "}"]
    ):
        (tmp_path / f"{number}.jsonl").write_text(f"{line}\n{good}")
    assert prepare(f"jsonl:{tmp_path}/*.jsonl:text", tmp_path / "out", workers=1).documents == 7
    deep = '{"text": "x", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for line in ('{"text": null}', '{"body": "x"}', '["x"]', '{"text": "x', deep):
        (tmp_path / "bad.json").write_text(f"{line}\n{good}")
        with pytest.raises(DataError, match=r"bad\.json, line 1 ") as caught:
            prepare(f"jsonl:{tmp_path}/bad.json:text", tmp_path / "out2", workers=1)
        assert "memory" not in str(caught.value)


def test_files_as_tools_write_them(tmp_path):
    """hiyouga/LlamaFactory#370 (<|endoftext|> in text), huggingface/datasets#6073 (hidden folders),
    zstd's skippable frames (pzstd), zero-padded gzip (tar), CRLF, NUL."""
    texts = ["plain", "a\x00b", "says <|endoftext|> here", "  \n\t", "é😀\r\n", "word " * 90_000]
    body = "".join(json.dumps({"text": text}) + "\r\n" for text in texts).encode()
    skip = struct.pack("<II", 0x184D2A50, 4) + b"\0\0\0\1"
    zstd = zstandard.compress
    folder = tmp_path / ".hidden" / "with space ünï"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(body)
    (folder / "b.jsonl.zst").write_bytes(skip + zstd(body[:50]) + skip + zstd(body[50:]) + skip)
    (folder / "c.jsonl.zst").write_bytes(zstd(b"") + zstd(body))
    (folder / "d.jsonl.gz").write_bytes(
        gzip.compress(body[:99]) + gzip.compress(body[99:]) + bytes(512)
    )
    prepare(f"jsonl:{folder}/*:text", tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == sorted(4 * texts)


def test_a_temporary_folder_far_down(corpus, tmp_path, monkeypatch):
    """Jobs of clusters have such a one; the path of a socket has 107 bytes at most."""
    far = tmp_path / ("far" * 30)
    far.mkdir()
    monkeypatch.setenv("TMPDIR", str(far))
    code = (
        "import sys\nfrom pathlib import Path\nfrom flashtrain.data.sources import prepare\n"
        "print(prepare(sys.argv[1], Path(sys.argv[2]), workers=1).documents)"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run(
        [sys.executable, "-c", code, corpus, str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full; free space there"),
        (errno.EROFS, "the file system is read-only; choose another folder"),
        (errno.EIO, "the disk reported an I/O error"),
    ],
)
def test_a_disk_that_refuses_is_one_line(corpus, tmp_path, monkeypatch, capsys, code, words):
    """The true cause, and no advice about another one."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("flashtrain.data.preparation.assemble", refuse)
    monkeypatch.setattr(
        sys, "argv", ["prepare_data", f"--dataset={corpus}", f"--out={tmp_path}/out", "--workers=1"]
    )
    handlers = keep_signal_handlers(monkeypatch)
    assert launcher.run_main(prepare_data.main) == 2
    assert handlers
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert ("free space" in line) == (code == errno.ENOSPC)


def keep_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A program that has ended ignores signals; this test goes on."""
    handlers: list[object] = []
    monkeypatch.setattr("signal.signal", lambda number, handler: handlers.append(handler))
    return handlers
