"""Tokenizers, by the name that a dataset's manifest records."""

import base64
import functools
import hashlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from flashtrain.data.errors import DataError, missing_package
from flashtrain.data.gpt2_vocabulary import read_ranks


class Tokenizer(Protocol):
    """Text to token ids 0..vocab_size-1 and back.

    Attributes:
        end_of_text: the token that follows a document, None where there is none.
        sha256: of all that decides which tokens a text becomes.
    """

    name: str
    vocab_size: int

    @property
    def end_of_text(self) -> int | None: ...

    @property
    def sha256(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_to_array(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 as tokens: no vocabulary to learn, and every text has tokens."""

    name = "bytes"
    vocab_size = 256
    end_of_text: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`; of U+FFFD for lone surrogates, which have none."""
        return self.encode_to_array(text).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """The same as uint8 [bytes]."""
        try:
            return np.frombuffer(text.encode("utf-8"), np.uint8)
        except UnicodeEncodeError:
            return np.frombuffer(_without_surrogates(text).encode("utf-8"), np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the bytes; what is not valid UTF-8, or no byte at all, becomes U+FFFD.

        A model with a larger vocabulary than its data's may sample tokens that are no bytes.
        """
        never_in_utf8 = 0xFF
        data = bytes(t if 0 <= t < self.vocab_size else never_in_utf8 for t in tokens)
        return data.decode("utf-8", errors="replace")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, computed by tiktoken.

    Text that spells <|endoftext|> is text like any other: only the end of a document is its end.
    Lone surrogates, which are no Unicode text but occur in JSON, become U+FFFD.

    Raises:
        DataError: the vocabulary is not installed, see gpt2_vocabulary.py.
    """

    name = "gpt2"
    vocab_size = 50257
    end_of_text: int = 50256

    # The published pattern with possessive quantifiers, which match the same and do not backtrack.
    _PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def __init__(self) -> None:
        try:
            import tiktoken  # here: byte datasets need none
        except ImportError as error:
            raise missing_package("tiktoken", error) from error
        self._ranks = read_ranks()
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=self._PATTERN,
            mergeable_ranks=self._ranks,
            special_tokens={"<|endoftext|>": self.end_of_text},
        )

    @functools.cached_property
    def sha256(self) -> str:
        """Of the ranks as tiktoken's own files list them: a token in base 64 and its rank."""
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in self._ranks.items())
        return hashlib.sha256(b"".join(lines)).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._encoding.encode_ordinary(text)

    def encode_to_array(self, text: str) -> np.ndarray:
        """The same as uint32 [tokens], without a Python object for each."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # as tiktoken does for lists
            return self._encoding.encode_to_numpy(_without_surrogates(text), disallowed_special=())

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens; U+FFFD for what is not valid UTF-8 or no token at all.

        A model's vocabulary is padded, so it may sample ids that are no tokens.
        """
        known = [t if 0 <= t < self.vocab_size else -1 for t in tokens]
        data = b"".join(
            b"\xff" if t < 0 else self._encoding.decode_single_token_bytes(t) for t in known
        )
        return data.decode("utf-8", errors="replace")


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_TOKENIZERS: dict[str, type[Tokenizer]] = {t.name: t for t in (ByteTokenizer, GPT2Tokenizer)}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Raises:
        DataError: there is no such tokenizer, or it is not installed.
    """
    if name not in _TOKENIZERS:
        raise DataError(f"no tokenizer {name!r}; supported: {', '.join(sorted(_TOKENIZERS))}")
    return _TOKENIZERS[name]()
