"""The dropout mask of all ops: a pure function of seed, offset, row and column."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_mask(rng_state: Tensor, rows: int, cols: int, dropout_p: float) -> Tensor:
    """The mask [rows, cols] (uint8, 1 = kept) of Philox-4x32-10 (Salmon et al., SC11).

    key = seed; counter = {col // 4, row, offset low, offset high}, with the high half of row added
    to the last word; element = word col % 4; kept where word >= floor(dropout_p * 2**32).
    """
    mask32 = 0xFFFFFFFF
    seed, offset = (int(v) for v in rng_state.tolist())
    groups = (cols + 3) // 4
    row = torch.arange(rows, dtype=torch.int64)[:, None].expand(rows, groups)
    c0 = torch.arange(groups, dtype=torch.int64)[None, :].expand(rows, groups)
    c1, c2 = row & mask32, torch.full_like(row, offset & mask32)
    c3 = ((row >> 32) + (offset >> 32)) & mask32
    key0, key1 = seed & mask32, (seed >> 32) & mask32
    for _ in range(10):
        # int64 products wrap like uint64 ones; the masks make the shifts logical.
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((product1 >> 32) & mask32) ^ c1 ^ key0,
            product1 & mask32,
            ((product0 >> 32) & mask32) ^ c3 ^ key1,
            product0 & mask32,
        )
        key0, key1 = (key0 + 0x9E3779B9) & mask32, (key1 + 0xBB67AE85) & mask32
    words = torch.stack([c0, c1, c2, c3], dim=-1).reshape(rows, groups * 4)[:, :cols]
    threshold = int(torch.tensor(dropout_p, dtype=torch.float32).item() * 2**32)
    return (words >= threshold).to(torch.uint8).to(rng_state.device)
