"""Text as it comes out of every kind of file, and the one line about each damaged one."""

import gzip
import json
import os
import tracemalloc
import types

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flashtrain.data import DataError
from flashtrain.data import corpus as corpus_module
from flashtrain.data.compressed import open_binary
from flashtrain.data.corpus import Corpus, Shard
from flashtrain.data.job import enter
from flashtrain.data.load import parse_mixture
from flashtrain.data.sources import default_folder, parse_source
from flashtrain.data.tokenizer import get_tokenizer

DOCUMENTS = ["To be, or not to be.\n", "naïve — 漢字 🎭", "x" * 5000, "\r\n tabs\t\0", "end"]


def texts(shard: Shard) -> list[str]:
    documents = [""]
    for piece in shard.pieces():
        documents[-1] += piece.text
        if piece.ends_document:
            documents.append("")
    assert documents.pop() == ""
    return documents


def all_texts(corpus: Corpus, split: str = "train") -> list[str]:
    return [text for shard in corpus.splits[split] for text in texts(shard)]


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data[:100]) + gzip.compress(data[100:])
    if suffix == ".zst":  # two frames
        zstd = zstandard.ZstdCompressor()
        return zstd.compress(data[:100]) + zstd.compress(data[100:])
    return data


def json_lines(documents: list[str]) -> bytes:
    rows = [json.dumps({"meta": {"n": n}, "text": text}) for n, text in enumerate(documents)]
    return "\n\n".join(rows).encode() + b"\n"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files(tmp_path, suffix):
    for number, text in enumerate([*DOCUMENTS, ""]):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(compress(text.encode(), suffix))
    source = parse_source(f"text:{tmp_path}/*.txt{suffix}")
    assert all_texts(source.corpus()) == DOCUMENTS
    assert len(source.files()["train"]) == 6


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(json_lines([*DOCUMENTS, ""]), suffix))
    assert all_texts(parse_source(f"jsonl:{path}:text").corpus()) == DOCUMENTS


def test_lone_surrogates_in_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    corpus = parse_source(f"jsonl:{tmp_path}/a.jsonl:text").corpus()
    assert all_texts(corpus) == ["a\ud800b"]


def test_parquet(tmp_path):
    table = pyarrow.table({"id": range(6), "body": [*DOCUMENTS, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = parse_source(f"parquet:{tmp_path}/*.parquet:body")
    assert all_texts(source.corpus()) == DOCUMENTS
    for column in ("text", "id"):
        corpus = parse_source(f"parquet:{tmp_path}/*.parquet:{column}").corpus()
        with pytest.raises(
            DataError, match=rf"no column '{column}' of strings; it has: id \(int64"
        ):
            all_texts(corpus)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file"):
        all_texts(source.corpus())


@pytest.fixture
def folder_of_datasets(tmp_path, monkeypatch):
    """A folder as the hub has them, and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    for split, documents in (("train", DOCUMENTS), ("validation", DOCUMENTS[:2])):
        for shard in (0, 1):
            table = pyarrow.table({"id": range(len(documents)), "text": documents})
            path = folder / "data" / f"{split}-0000{shard}-of-00002.parquet"
            pyarrow.parquet.write_table(table, path)
    return folder


def test_datasets_in_the_layout_of_the_hub(folder_of_datasets):
    source = parse_source(f"hf:{folder_of_datasets}")
    corpus = source.corpus()
    assert {split: len(shards) for split, shards in corpus.splits.items()} == {"train": 2, "val": 2}
    assert all_texts(corpus) == DOCUMENTS * 2
    assert all_texts(corpus, "val") == DOCUMENTS[:2] * 2
    with pytest.raises(DataError, match=r"no text in column 'words'\s+Columns of strings: text;"):
        parse_source(f"hf:{folder_of_datasets}::words").corpus()


def test_a_dataset_of_the_hub_is_read_at_one_commit(folder_of_datasets, monkeypatch, tmp_path):
    """Also by a later run, which continues a stopped one; the newest commit may be another."""
    import datasets  # here: it reads the environment

    commits = iter(["a" * 40, "b" * 40])
    asked = []
    load = datasets.load_dataset

    def load_dataset(name, config, revision=None, **options):
        asked.append((name, revision))
        return load(str(folder_of_datasets), config, **options)

    def load_builder(name, config):
        return types.SimpleNamespace(hash=next(commits))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    source = parse_source("hf:somebody/something")
    tokenizer = get_tokenizer("gpt2")
    for _ in range(2):
        job, corpus = enter(tmp_path / ".out.partial", source, tokenizer, 100, print)
        assert job.text == {"revision": "a" * 40}
        assert all_texts(corpus, "val") == DOCUMENTS[:2] * 2
    assert set(asked) == {("somebody/something", "a" * 40)}


def test_a_dataset_that_is_not_there_is_one_line(folder_of_datasets):
    with pytest.raises(DataError, match=r"dataset 'nobody/nothing' cannot be read .* HF_HUB_OFFL"):
        parse_source("hf:nobody/nothing").corpus()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"a" * 70 + b"\xff", r"a\.txt is not UTF-8: byte 0xff at offset 70; convert"),
        ("a.txt", b"ab\xe6\xbc", r"is not UTF-8: byte 0xe6 at offset 2;"),
        ("a.txt.gz", gzip.compress(b"text" * 100)[:-9], r"a\.txt\.gz is damaged or incomplete"),
        ("a.txt.gz", b"text", r"is damaged or incomplete"),
        ("a.txt.zst", zstandard.compress(b"text" * 99999)[:-3], r"is incomplete: it ends within"),
        ("a.txt.zst", b"text" * 9, r"a\.txt\.zst is damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1 is not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b'{"body": "a"}\n', r"line 1 has no text in field 'text'; its fields: body"),
        ("a.jsonl", b'{"text": 1}\n', r"line 1 has no text in field 'text'"),
        ("a.jsonl", b"[1]\n", r"line 1 has no text in field 'text'; .* it is no object"),
        ("a.jsonl", b'{"text": "a"}\n{"b": ' + b"[" * 10**5, r"line 2 is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"line 1 has no text in field 'text'"),
        ("a.jsonl", b"\xff\xfe{\x00}\x00", r"a\.jsonl is UTF-16 or UTF-32, not UTF-8; convert"),
        ("a.txt", "\ufefftext".encode("utf-16-be"), r"a\.txt is UTF-16, not UTF-8; convert it"),
        ("a.txt", gzip.compress(b"text"), r"a\.txt is compressed by gzip, but its name does"),
        ("a.txt", zstandard.compress(b"text"), r"a\.txt is compressed by zstd, but its name"),
        ("a.txt", b"\xef\xbb\xbftext\xff", r"is not UTF-8: byte 0xff at offset 7;"),
        ("a.txt.gz", gzip.compress(b"text")[:9], r"a\.txt\.gz is damaged or incomplete"),
    ],
)
def test_damaged_files(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    kind = "jsonl" if ".jsonl" in name else "text"
    dataset = f"{kind}:{tmp_path}/*" + (":text" if kind == "jsonl" else "")
    with pytest.raises(DataError, match=complaint) as caught:
        all_texts(parse_source(dataset).corpus())
    assert "\n" not in str(caught.value)


def test_numbers_and_constants_of_any_size_are_no_matter(tmp_path):
    lines = ['{"id": %s, "text": "a"}' % ("1" * 5000), '{"x": [NaN, -Infinity], "text": "b"}']
    lines += ['{"text": "first", "text": "last"}', '{"text": "a\\u0000b"}']
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines))
    corpus = parse_source(f"jsonl:{tmp_path}/a.jsonl:text").corpus()
    assert all_texts(corpus) == ["a", "b", "last", "a\0b"]


def test_a_byte_order_mark_in_a_compressed_file_is_no_text(tmp_path):
    (tmp_path / "a.txt.GZ").write_bytes(gzip.compress(b"\xef\xbb\xbf\xef\xbb\xbftext"))
    corpus = parse_source(f"text:{tmp_path}/*").corpus()
    assert all_texts(corpus) == ["\ufefftext"]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_MAX_LINE_BYTES", 2**20)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(bytes(2**24)))
    with pytest.raises(DataError, match=r"a line of more than 1,048,576 bytes"):
        all_texts(parse_source(f"jsonl:{tmp_path}/*:text").corpus())


def test_a_bomb_is_decoded_piece_by_piece(tmp_path):
    zstd, block = zstandard.ZstdCompressor().compressobj(), bytes(2**20)
    parts = [zstd.compress(block) for _ in range(1024)]
    (tmp_path / "a.zst").write_bytes(b"".join(parts) + zstd.flush())
    tracemalloc.start()
    with open_binary(tmp_path / "a.zst") as file:
        assert sum(len(block) for block in iter(lambda: file.read(2**20), b"")) == 2**30
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 2**20


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_parquet_has_many_types_of_text(tmp_path, kind):
    texts = pyarrow.array([*DOCUMENTS, None])
    binary = str(kind) in ("binary", "large_binary")
    texts = texts.cast(pyarrow.binary()).cast(kind) if binary else texts.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    corpus = parse_source(f"parquet:{tmp_path}/*:text").corpus()
    assert all_texts(corpus) == DOCUMENTS


def test_parquet_that_is_no_text(tmp_path):
    lists = pyarrow.array([["a"], ["b"]])
    columns = {
        "list": lists,
        "dictionary": pyarrow.array([1, 2]).dictionary_encode(),
        "struct": pyarrow.array([{"x": "a"}, {"x": "b"}]),
        "null": pyarrow.nulls(2),
        "bytes": pyarrow.array([b"ab", b"a\xff"]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for column in ("list", "dictionary", "struct", "struct.x"):
        with pytest.raises(DataError, match=rf"no column '{column}' of strings; it has: list"):
            all_texts(parse_source(f"parquet:{tmp_path}/*:{column}").corpus())
    assert all_texts(parse_source(f"parquet:{tmp_path}/*:null").corpus()) == []
    with pytest.raises(DataError, match=r"a\.parquet, column 'bytes', .* not UTF-8 \(byte 0xff\)"):
        all_texts(parse_source(f"parquet:{tmp_path}/*:bytes").corpus())
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:200], whole[50:]):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file"):
            all_texts(parse_source(f"parquet:{tmp_path}/*:null").corpus())


def test_what_matches_but_is_no_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder.txt").mkdir()
    source = parse_source(f"text:{tmp_path}/*")
    assert all_texts(source.corpus()) == ["a"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is a pipe, a device or a socket, not a file"):
        source.files()
    (tmp_path / "pipe").unlink()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DataError, match="link is a symbolic link to nothing"):
        source.files()
    (tmp_path / "link").unlink()
    real = os.access  # which allows root everything
    monkeypatch.setattr(os, "access", lambda path, mode: path != f"{tmp_path}" and real(path, mode))
    with pytest.raises(DataError, match=rf"cannot read {tmp_path}: permission denied"):
        source.files()


def test_a_file_that_has_gone(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    corpus = parse_source(f"text:{tmp_path}/*").corpus()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError):  # workers.py makes a line of it
        all_texts(corpus)
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt is a pipe, not a regular file"):
        all_texts(corpus)


def test_offsets_of_bad_bytes_far_into_a_file(tmp_path):
    data = "é漢".encode() * 600_000
    (tmp_path / "a.txt").write_bytes(data + b"\xc3(" + data)
    with pytest.raises(DataError, match=rf"byte 0xc3 at offset {len(data):,};"):
        all_texts(parse_source(f"text:{tmp_path}/a.txt").corpus())


def test_the_pile_of_local_shards(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("train/01.jsonl.zst", "train/00.jsonl.zst", "val.jsonl.zst"):
        (tmp_path / name).write_bytes(compress(json_lines([name, "more"]), ".zst"))
    source = parse_source(f"the_pile:{tmp_path}")
    assert source.dataset == "the_pile"
    assert all_texts(source.corpus()) == [
        "train/00.jsonl.zst",
        "more",
        "train/01.jsonl.zst",
        "more",
    ]
    assert all_texts(source.corpus(), "val") == ["val.jsonl.zst", "more"]
    assert "test" not in source.corpus().splits
    with pytest.raises(DataError, match=r"/nowhere/train/\*\.jsonl\.zst; The Pile is no longer"):
        parse_source("the_pile:/nowhere").files()


@pytest.mark.parametrize(
    ("dataset", "complaint"),
    [
        ("opnwebtext", r"'opnwebtext' is unknown; did you mean 'openwebtext'\?"),
        ("csv:*.csv", r"'csv:\*\.csv' is unknown; .*forms: hf:"),
        ("jsonl:*.jsonl", r"is incomplete; its form is jsonl:<glob>:<field>"),
        ("text:", r"is incomplete; its form is text:<glob>"),
        ("hf:a:b:c:d", r"is incomplete; its form is hf:"),
    ],
)
def test_unknown_datasets(dataset, complaint):
    with pytest.raises(DataError, match=complaint):
        parse_source(dataset)


def test_files_are_found_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    with pytest.raises(DataError, match=rf"no file matches {tmp_path}/in/\*\.txt; the pattern"):
        parse_source("text:in/*.txt").corpus()
    (tmp_path / "in" / "folder.txt").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    assert all_texts(parse_source("text:in/*.txt").corpus()) == ["a"]


def test_default_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert default_folder("openwebtext") == tmp_path / "openwebtext"
    assert default_folder("the_pile:/mnt/pile") == tmp_path / "the_pile"
    assert default_folder("text:\udcff/*").name.startswith("text-")
    names = {default_folder(d).name for d in ("text:a/*.txt", "text:b/*.txt", "hf:a/b", "hf:b")}
    assert len(names) == 4
    assert all(name.replace("-", "").isalnum() for name in names)


def test_mixtures():
    assert parse_mixture("openwebtext") == [(1.0, "openwebtext")]
    assert parse_mixture("text:/a/*.txt,b") == [(1.0, "text:/a/*.txt,b")]
    assert parse_mixture("0.7*a, 0.3*text:b/*.txt") == [(0.7, "a"), (0.3, "text:b/*.txt")]
    for bad in ("1*a,b", "0*a,1*b", "1.2.3*a"):
        with pytest.raises(DataError, match=r"is not <weight>\*<dataset>"):
            parse_mixture(bad)
