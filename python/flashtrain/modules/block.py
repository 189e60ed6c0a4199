"""A pre-norm transformer block that carries the residual stream beside the hidden states.

Legend: B batch, T sequence, D model width.
"""

from torch import Tensor, nn

from flashtrain.modules.add_norm import DropoutAddNorm
from flashtrain.modules.attention import CausalSelfAttention
from flashtrain.modules.mlp import Mlp


class Block(nn.Module):
    """Add + norm -> attention -> add + norm -> MLP.

    The add that closes a sublayer is fused with the norm that opens the next, so a block receives
    the output of the previous sublayer not yet added to the residual stream, and hands its own on
    in the same way (Dao et al., https://github.com/Dao-AILab/flash-attention, use the same order).
    The first block receives the embeddings and no residual; after the last block one more add +
    norm follows.
    """

    def __init__(
        self,
        norm1: DropoutAddNorm,
        attention: CausalSelfAttention,
        norm2: DropoutAddNorm,
        mlp: Mlp,
    ):
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp

    def forward(
        self, hidden_BTD: Tensor, residual_BTD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """([B, T, D], [B, T, D] or None) -> (MLP output not yet added, residual stream)."""
        hidden_BTD, residual_BTD = self.norm1(hidden_BTD, residual_BTD)
        hidden_BTD = self.attention(hidden_BTD)
        hidden_BTD, residual_BTD = self.norm2(hidden_BTD, residual_BTD)
        return self.mlp(hidden_BTD), residual_BTD
