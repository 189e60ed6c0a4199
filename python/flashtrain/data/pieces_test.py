"""Long texts are cut where the tokens do not notice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data import GPT2Tokenizer, pieces
from flashtrain.data.corpus import Piece, document
from flashtrain.data.pieces import cut

_TEXTS = st.one_of(
    st.text(max_size=200),
    st.text(alphabet=" \n\t\r'\u00a0\u3000\x1c.s1é漢", max_size=200),
    st.text(alphabet="ab ", max_size=200),
)
_TOKENIZER = GPT2Tokenizer()


@settings(max_examples=300, deadline=None)
@given(text=_TEXTS, limit=st.integers(1, 50), blocks=st.integers(1, 60))
def test_pieces_join_to_the_text_whatever_its_blocks(text, limit, blocks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARS", limit)
        whole = list(cut([text]))
        assert "".join(whole) == text
        assert all(1 <= len(piece) <= limit for piece in whole)
        assert list(cut(text[i : i + blocks] for i in range(0, len(text), blocks))) == whole


@settings(max_examples=500, deadline=None)
@given(text=_TEXTS, limit=st.integers(1, 50))
def test_cuts_at_boundaries_leave_the_tokens_as_they_are(text, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARS", limit)
        parts = list(cut([text]))
    # A cut that no boundary allowed joins its two pieces again.
    joined = parts[:1]
    for part in parts[1:]:
        if part[0] in " \n" and not joined[-1][-1].isspace():
            joined.append(part)
        else:
            joined[-1] += part
    tokens = [token for part in joined for token in _TOKENIZER.encode(part)]
    assert tokens == _TOKENIZER.encode(text)


def test_ordinary_text_is_cut_near_the_limit():
    text = "word " * 200_000
    parts = list(cut([text]))
    assert len(parts) == -(-len(text) // pieces.PIECE_CHARS)
    tokens = [token for part in parts for token in _TOKENIZER.encode(part)]
    assert tokens == _TOKENIZER.encode(text)


@pytest.mark.parametrize("unit", [" ", "\n", "\u3000", "x", "1", "!", " \n", "漢"])
def test_a_million_of_anything_can_be_encoded(unit):
    text = unit * (1_500_000 // len(unit)) + "end"
    tokens = [token for part in cut([text]) for token in _TOKENIZER.encode(part)]
    assert _TOKENIZER.decode(tokens).replace("\ufffd", "") in (text, text.replace("漢", ""))


def test_documents_end_once():
    assert list(document(["a", "b"])) == [Piece("ab", True)]
    assert list(document([])) == list(document(["", ""])) == []
    parts = list(document(["word " * 100_000]))
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 1
