"""The head of a language model: hidden states to logits or loss.

Legend: B batch, T sequence, D model width, V padded vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LanguageModelHead(nn.Linear):
    """Logits of each token, -inf in the columns that pad the vocabulary.

    Args:
        d_model: D.
        vocab_size: real tokens.
        padded_vocab_size: rows V of the weight.
        fused: compute the loss without ever holding all logits, see
            `flashtrain.ops.linear_cross_entropy`.
    """

    def __init__(self, d_model: int, vocab_size: int, padded_vocab_size: int, *, fused: bool):
        super().__init__(d_model, padded_vocab_size, bias=False)
        self.vocab_size = vocab_size
        self.fused = fused
        # Added to the logits in the matmul's epilogue: 0 for tokens, -inf for padding columns.
        padding_mask = torch.zeros(padded_vocab_size)
        padding_mask[vocab_size:] = -math.inf
        self.register_buffer("padding_mask", padding_mask, persistent=False)
        if fused:
            # Imported on demand: the plain model needs no compiled extension.
            from flashtrain.ops.linear_cross_entropy import linear_cross_entropy

            self._linear_cross_entropy: Any = linear_cross_entropy

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V], -inf in the padding columns."""
        if self.out_features == self.vocab_size:
            return super().forward(hidden_BTD)
        return F.linear(hidden_BTD, self.weight, self.padding_mask.to(self.weight.dtype))

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats: a scalar in fp32, fp64 for an fp64 model.

        Args:
            hidden_BTD: [B, T, D].
            targets_BT: int64 [B, T]; -100 does not count. Where none counts, the loss is 0.
        """
        if self.fused:
            return self._linear_cross_entropy(
                hidden_BTD, self.weight, targets_BT, vocab_size=self.vocab_size
            )
        logits_BTV = self(hidden_BTD)
        if logits_BTV.dtype != torch.float64:
            logits_BTV = logits_BTV.float()
        targets = targets_BT.flatten()
        total = F.cross_entropy(logits_BTV.flatten(0, 1), targets, reduction="sum")
        return total / (targets != -100).sum().clamp(min=1)
