"""Datasets by name: where their prepared files are, and how some are prepared on the spot."""

import os
from collections.abc import Callable
from pathlib import Path

from flashtrain.data.dataset import TokenDataset
from flashtrain.data.errors import DataError
from flashtrain.data.paths import cache_dir, user_path
from flashtrain.data.shakespeare import prepare_shakespeare
from flashtrain.data.token_files import MANIFEST
from flashtrain.errors import did_you_mean

# Sources that training prepares by itself.
_PREPARE: dict[str, Callable[[Path], None]] = {"shakespeare": prepare_shakespeare}

# Sources that are read where a prepared folder of them exists.
_PREPARED_ONLY = ("openwebtext", "the_pile")


def prepare(source: str) -> Path:
    """The folder of a source's prepared data, prepared first where that is needed and possible.

    Raises:
        DataError: the source is unknown, or is not there and cannot be prepared here.
    """
    folder = cache_dir(source)
    if source in _PREPARE:
        _PREPARE[source](folder)
        return folder
    if source in _PREPARED_ONLY:
        if not (folder / MANIFEST).exists():
            raise DataError(
                f"no prepared data for data.source={source!r}: looked for {folder / MANIFEST};"
                " set DATA_DIR to the folder above it, or --config.data.path to any prepared folder"
            )
        return folder
    raise DataError(
        f"data.source={source!r} is unknown; {did_you_mean(source, [*_PREPARE, *_PREPARED_ONLY])}"
        " (or set --config.data.path to a prepared folder)"
    )


def load_dataset(
    path: str | os.PathLike[str] | None = None,
    *,
    source: str | None = None,
    seq_len: int,
    seed: int,
    verify: bool = False,
) -> TokenDataset:
    """Opens prepared data.

    Args:
        path: a folder of prepared data, relative to the user's folder; where it is empty or None,
            `source` decides.
        source: a name for `prepare`.
        seq_len, seed, verify: see `TokenDataset`.

    Raises:
        DataError: nothing usable is there; the message says what to do.
    """
    if path:
        folder = user_path(path)
    elif source:
        folder = prepare(source)
    else:
        raise DataError("neither data.path nor data.source is set; set one of them")
    return TokenDataset(folder, seq_len=seq_len, seed=seed, verify=verify)
