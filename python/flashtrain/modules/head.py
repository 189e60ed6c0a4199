"""The head of a language model: hidden states to logits or loss.

Legend: B batch, T sequence, D model width, V padded vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtrain.modules.ids import outside


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
        if fused:
            # Imported on demand: the plain model needs no compiled extension.
            from flashtrain.ops.linear_cross_entropy import linear_cross_entropy

            self._linear_cross_entropy: Any = linear_cross_entropy

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V], -inf in the padding columns."""
        if self.out_features == self.vocab_size:
            return super().forward(hidden_BTD)
        # Made anew, not a buffer: to_empty and load_state_dict leave those undefined that no state
        # dict holds. It is added in the matmul's epilogue.
        bias_V = torch.zeros(self.out_features, dtype=self.weight.dtype, device=hidden_BTD.device)
        bias_V[self.vocab_size :] = -math.inf
        return F.linear(hidden_BTD, self.weight, bias_V)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats: a scalar in fp32, fp64 for an fp64 model.

        Args:
            hidden_BTD: [B, T, D].
            targets_BT: int64 [B, T]; -100 does not count. Where none counts, the loss is 0.

        Raises:
            ValueError: a target is another number outside the vocabulary; on CUDA the loss is NaN
                then or, unfused, there is a device-side assertion.
        """
        if self.fused:
            return self._linear_cross_entropy(
                hidden_BTD, self.weight, targets_BT, vocab_size=self.vocab_size
            )
        logits_BTV = self(hidden_BTD)
        if logits_BTV.dtype != torch.float64:
            logits_BTV = logits_BTV.float()
        targets = targets_BT.flatten()
        # Padding is as far outside as no column at all.
        known = targets.masked_fill(targets >= self.vocab_size, self.out_features)
        try:
            total = F.cross_entropy(logits_BTV.flatten(0, 1), known, reduction="sum")
        except IndexError as error:
            raise outside("target", targets, self.vocab_size, ignored=-100) or error from None
        return total / (targets != -100).sum().clamp(min=1)
