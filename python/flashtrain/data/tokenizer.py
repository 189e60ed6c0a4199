"""Tokenizers, by the name that a dataset's manifest records."""

from collections.abc import Iterable
from typing import Protocol

from flashtrain.data.errors import DataError


class Tokenizer(Protocol):
    """Text to token ids 0..vocab_size-1 and back."""

    name: str
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """The 256 bytes of UTF-8 as tokens: no vocabulary to learn, no text that it cannot hold."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the bytes; what is not valid UTF-8, or no byte at all, becomes U+FFFD.

        A model with a larger vocabulary than its data's may well sample tokens that are no bytes.
        """
        never_in_utf8 = 0xFF
        data = bytes(t if 0 <= t < self.vocab_size else never_in_utf8 for t in tokens)
        return data.decode("utf-8", errors="replace")


_TOKENIZERS: dict[str, type[Tokenizer]] = {ByteTokenizer.name: ByteTokenizer}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Raises:
        DataError: there is no such tokenizer.
    """
    if name not in _TOKENIZERS:
        raise DataError(f"no tokenizer {name!r}; supported: {', '.join(sorted(_TOKENIZERS))}")
    return _TOKENIZERS[name]()
