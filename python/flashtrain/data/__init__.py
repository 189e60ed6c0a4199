"""Datasets of tokens: preparation, the files' format and the order in which training reads them.

>>> from flashtrain.data import load_dataset
>>> dataset = load_dataset(source="shakespeare", seq_len=128, seed=1111)
>>> tokens_BT, targets_BT = dataset.train_batch(step=0, global_batch_size=16)
"""

import importlib
from typing import TYPE_CHECKING, Any

from flashtrain.data.errors import DataError
from flashtrain.data.tokenizer import ByteTokenizer, GPT2Tokenizer, Tokenizer, get_tokenizer

if TYPE_CHECKING:
    from flashtrain.data.dataset import TokenDataset
    from flashtrain.data.describe import describe_samples
    from flashtrain.data.load import load_dataset
    from flashtrain.data.loader import BatchLoader
    from flashtrain.data.sources import prepare

__all__ = [
    "BatchLoader",
    "ByteTokenizer",
    "DataError",
    "GPT2Tokenizer",
    "TokenDataset",
    "Tokenizer",
    "describe_samples",
    "get_tokenizer",
    "load_dataset",
    "prepare",
]

# Most of these import torch, which needs seconds; the processes that tokenize do without it.
_LAZY = {
    "BatchLoader": "loader",
    "TokenDataset": "dataset",
    "describe_samples": "describe",
    "load_dataset": "load",
    "prepare": "sources",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
