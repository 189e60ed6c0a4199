"""Opens datasets by path, name or mixture of names, and prepares those that are missing.

Any number of processes may ask for the same dataset at once: one prepares it, the others wait.
"""

import os
import re
from pathlib import Path

from flashtrain.data.dataset import Part, TokenDataset
from flashtrain.data.errors import DataError
from flashtrain.data.paths import user_path
from flashtrain.data.sources import prepare

_WEIGHTED = re.compile(r"\s*([0-9.]+)\s*\*\s*(.+?)\s*")


def load_dataset(
    path: str | os.PathLike[str] | None = None,
    *,
    source: str | None = None,
    seq_len: int,
    seed: int,
    document_mask: bool = False,
    verify: bool = False,
) -> TokenDataset:
    """Opens prepared data, and prepares it first if it is missing.

    Args:
        path: a folder of prepared data, relative to the user's folder; where it is empty or None,
            `source` decides.
        source: a dataset for `prepare`, or several with their weights, "0.7*openwebtext,0.3*...".
        seq_len, seed, document_mask, verify: see `TokenDataset`.

    Raises:
        DataError: nothing usable is there; the message says what to do.
    """
    if path:
        parts = [Part(user_path(path), 1.0)]
    elif source:
        parts = [Part(_prepared(name), weight) for weight, name in parse_mixture(source)]
    else:
        raise DataError("neither data.path nor data.source is set; set one of them")
    return TokenDataset(
        parts, seq_len=seq_len, seed=seed, document_mask=document_mask, verify=verify
    )


def parse_mixture(source: str) -> list[tuple[float, str]]:
    """Weights and datasets of "0.7*openwebtext,0.3*wikitext103"; one without a weight is itself.

    Raises:
        DataError: it begins like a mixture but is none.
    """
    if not _WEIGHTED.fullmatch(source):
        return [(1.0, source)]
    parts = []
    for term in source.split(","):
        match = _WEIGHTED.fullmatch(term)
        try:
            weight = float(match[1]) if match else 0.0
        except ValueError:
            weight = 0.0
        if match is None or weight <= 0:
            raise DataError(
                f"data.source={source!r}: {term!r} is not <weight>*<dataset>, with a weight above"
                " 0, as in 0.7*openwebtext,0.3*wikitext103"
            )
        parts.append((weight, match[2]))
    return parts


def _prepared(dataset: str) -> Path:
    return Path(prepare(dataset).manifest).parent
