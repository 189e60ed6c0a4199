"""Cuts long texts where the tokenizer would cut them too.

A tokenizer's regular expression runs out of stack on a million blanks, and a text of 100 MB would
need gigabytes while it is encoded. In GPT-2's pattern, white space begins a token or follows white
space within one. So the tokens before a blank or line break that follows another character do not
depend on the text after it: the pieces on both sides have the tokens of the whole.
"""

import re
from collections.abc import Iterable, Iterator

# Characters of a piece at most. Twice as many blanks in a row are still within tiktoken's limits.
PIECE_CHARS = 2**18

# Python's \S excludes all white space of Unicode and a few control characters more.
_BOUNDARY = re.compile(r"(?<=\S)[ \n]")
# In text, boundaries are a word apart, so only the end of a piece is searched first.
_TAIL = 2**12


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """The pieces, none empty, of a document that comes in blocks of any size.

    The pieces do not depend on the sizes of the blocks. Where `PIECE_CHARS` characters hold no
    boundary (one word, or white space alone) they are cut anyway: there a token may end earlier
    than in the whole.
    """
    text = ""
    for block in blocks:
        text += block
        start = 0
        while len(text) - start > PIECE_CHARS:
            end = _boundary(text, start)
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def _boundary(text: str, start: int) -> int:
    limit = start + PIECE_CHARS
    for begin in (max(start + 1, limit - _TAIL), start + 1):
        # The boundary is where a match begins, so one at `limit` counts too.
        boundaries = [match.start() for match in _BOUNDARY.finditer(text, begin, limit + 1)]
        if boundaries:
            return boundaries[-1]
    return limit
