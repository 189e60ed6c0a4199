"""Token and position embeddings of GPT-2.

Legend: B batch, T sequence, D model width, V padded vocabulary.
"""

import torch
from torch import Tensor, nn


class TokenPositionEmbedding(nn.Module):
    """tokens[tokens_BT] + positions[0..T-1].

    Args:
        vocab_size: rows V of the token table, padding included.
        max_seq_len: rows of the position table, the longest sequence.
        d_model: width D.
    """

    def __init__(self, vocab_size: int, max_seq_len: int, d_model: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_seq_len, d_model)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T, D] in autocast's dtype where it is on, else in the tables'.

        Raises:
            ValueError: T is larger than max_seq_len.
        """
        seq_len, max_seq_len = tokens_BT.shape[1], self.positions.num_embeddings
        if seq_len > max_seq_len:
            raise ValueError(f"a sequence of {seq_len} tokens came, max_seq_len is {max_seq_len}")
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[:seq_len]
        device_type = tokens_BT.device.type
        if torch.is_autocast_enabled(device_type):
            # Autocast leaves sums alone; without this the whole residual stream would stay in fp32.
            x_BTD = x_BTD.to(torch.get_autocast_dtype(device_type))
        return x_BTD
