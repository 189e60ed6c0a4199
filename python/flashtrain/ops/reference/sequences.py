"""Sequences that stand one after the other, as cu_seqlens gives them."""

import torch
from torch import Tensor


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [total]: the sequence of each token; their number for tokens after the last."""
    tokens = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens, right=True) - 1
