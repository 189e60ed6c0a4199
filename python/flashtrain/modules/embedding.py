"""Embeddings of tokens, positions and image patches.

Legend: B batch, T sequence, D model width, V padded vocabulary, C channels, P patch size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.modules.ids import outside


def to_autocast_dtype(x: Tensor) -> Tensor:
    """`x` in autocast's dtype where it is on.

    Autocast leaves sums alone; without this the whole residual stream would stay in fp32.
    """
    device_type = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


class TokenPositionEmbedding(nn.Module):
    """tokens[tokens_BT] + positions[positions].

    Args:
        vocab_size: token ids are 0..vocab_size-1.
        max_seq_len: rows of the position table, the longest sequence; None: no such table.
        d_model: width D.
        padded_vocab_size: rows V of the token table; None: vocab_size.
    """

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int | None,
        d_model: int,
        padded_vocab_size: int | None = None,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.tokens = nn.Embedding(padded_vocab_size or vocab_size, d_model)
        self.positions: Any = None
        if max_seq_len is not None:
            self.positions = nn.Embedding(max_seq_len, d_model)

    def forward(self, tokens_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """int64 [B, T] -> [B, T, D] in autocast's dtype where it is on, else in the tables'.

        Args:
            tokens_BT: int64 [B, T].
            positions: int64 [T] or [B, T], of the tokens; None: 0..T-1.

        Raises:
            ValueError: T is larger than max_seq_len, or an id or position is outside its table;
                on CUDA the latter is a device-side assertion.
        """
        padded_vocab_size = self.tokens.num_embeddings
        known_BT = tokens_BT
        if padded_vocab_size > self.vocab_size:  # rows of padding are as far outside as no rows
            known_BT = tokens_BT.masked_fill(tokens_BT >= self.vocab_size, padded_vocab_size)
        try:
            x_BTD = self.tokens(known_BT)
            if self.positions is not None:
                if positions is None:
                    x_BTD = x_BTD + self._first_positions(tokens_BT.shape[1])
                else:
                    x_BTD = x_BTD + self.positions(positions)
        except IndexError as error:
            raise self._outside(tokens_BT, positions) or error from None
        return to_autocast_dtype(x_BTD)

    def _outside(self, tokens_BT: Tensor, positions: Tensor | None) -> ValueError | None:
        found = outside("token id", tokens_BT, self.vocab_size)
        if found is None and positions is not None and self.positions is not None:
            found = outside("position", positions, self.positions.num_embeddings)
        return found

    def _first_positions(self, seq_len: int) -> Tensor:
        max_seq_len = self.positions.num_embeddings
        if seq_len > max_seq_len:
            raise ValueError(f"a sequence of {seq_len} tokens came, max_seq_len is {max_seq_len}")
        return self.positions.weight[:seq_len]


class PatchEmbedding(nn.Module):
    """Cuts images into patches and projects each: a convolution whose stride is its size.

    Args:
        patch_size: P, height and width of a patch.
        num_channels: C.
        d_model: D.
    """

    def __init__(self, patch_size: int, num_channels: int, d_model: int):
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(num_channels * patch_size**2, d_model)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, C, H, W], H and W multiples of P -> [B, H / P * W / P, D], patches row by row.

        uint8 0..255 is scaled to -1..1; floats are taken as they are.
        """
        if not images_BCHW.is_floating_point():
            images_BCHW = images_BCHW.to(self.projection.weight.dtype) / 127.5 - 1.0
        size = self.patch_size
        # [B, C, rows, P, columns, P] -> [B, rows, columns, C, P, P]
        patches = images_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.projection(patches)
