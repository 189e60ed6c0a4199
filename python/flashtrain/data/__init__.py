"""Datasets of tokens: preparation, the files' format and the order in which training reads them.

>>> from flashtrain.data import load_dataset
>>> dataset = load_dataset(source="shakespeare", seq_len=128, seed=1111)
>>> tokens_BT, targets_BT = dataset.train_batch(step=0, global_batch_size=16)
"""

from flashtrain.data.dataset import TokenDataset
from flashtrain.data.errors import DataError
from flashtrain.data.sources import load_dataset, prepare
from flashtrain.data.tokenizer import ByteTokenizer, Tokenizer, get_tokenizer

__all__ = [
    "ByteTokenizer",
    "DataError",
    "TokenDataset",
    "Tokenizer",
    "get_tokenizer",
    "load_dataset",
    "prepare",
]
