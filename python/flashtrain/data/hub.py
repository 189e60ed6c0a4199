"""Datasets of the Hugging Face hub, or of local folders in its layouts, through `datasets`."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from flashtrain.data.errors import DataError, missing_package

T = TypeVar("T")

# Names of the same split in different datasets, ours first.
_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}


@dataclasses.dataclass(frozen=True)
class HubInfo:
    """The content of a dataset: each of our splits with its name there and its number of shards,
    and the column of text."""

    splits: dict[str, tuple[str, int]]
    column: str


def revision(name: str, config: str | None) -> str | None:
    """The commit that a dataset of the hub is at; None where `datasets` does not say.

    Raises:
        DataError: it cannot be reached, or does not exist.
    """

    def load() -> Any:
        import datasets

        return datasets.load_dataset_builder(name, config)

    found = str(_ask(name, config, load).hash or "")
    return found if re.fullmatch("[0-9a-f]{40}", found) else None


def describe(
    name: str, config: str | None, column: str | None, revision: str | None = None
) -> HubInfo:
    """Asks for a dataset's splits and columns.

    Args:
        name, config: as for datasets.load_dataset.
        column: of the text; None: "text", or the only column of strings.
        revision: its commit; None: the newest.

    Raises:
        DataError: it cannot be reached, does not exist, or has no such column or no training split.
    """

    def load() -> Any:
        import datasets

        return datasets.load_dataset(name, config, revision=revision, streaming=True)

    found = _ask(name, config, load)
    splits = {
        ours: (theirs, found[theirs].num_shards)
        for ours, names in _SPLITS.items()
        for theirs in names
        if theirs in found
    }
    if "train" not in splits:
        raise DataError(f"dataset {name!r} has no split 'train'; it has: {', '.join(found)}")
    train = found[splits["train"][0]]
    features: Any = train.features or _ask(name, config, lambda: next(iter(train.take(1)), {}))
    return HubInfo(splits, _text_column(name, features, column))


def _text_column(name: str, features: Any, column: str | None) -> str:
    def is_text(feature: Any) -> bool:
        return isinstance(feature, str) or getattr(feature, "dtype", None) in (
            "string",
            "large_string",
        )

    texts: list[str] = [key for key, feature in features.items() if is_text(feature)]
    wanted = column or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if wanted is None or wanted not in texts:
        raise DataError(
            f"dataset {name!r}: "
            + (f"no text in column {column!r}" if column else "which column is the text?")
            + f" Columns of strings: {', '.join(texts) or 'none'}; name one as"
            f" hf:{name}:<config>:<column>"
        )
    return wanted


def stream(
    name: str,
    config: str | None,
    split: str,
    num_shards: int,
    index: int,
    revision: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of one shard, in order."""

    def load() -> Any:
        import datasets

        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        return rows.shard(num_shards, index) if num_shards > 1 else rows

    rows = iter(_ask(name, config, load))
    end: dict[str, Any] = {}
    while (row := _ask(name, config, lambda: next(rows, end))) is not end:
        yield row


def _ask(name: str, config: str | None, question: Callable[[], T]) -> T:
    """Calls `datasets`, whose errors are of many kinds, and says in one line what went wrong."""
    try:
        return question()
    except ImportError as error:
        raise missing_package("datasets", error) from error
    except Exception as error:
        shown = f"{name}:{config}" if config else name
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"dataset {shown!r} cannot be read ({reason}); check its name and the network"
            " (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE), or prepare local files:"
            " text:<glob>, jsonl:<glob>:<field>, parquet:<glob>:<column>"
        ) from error
