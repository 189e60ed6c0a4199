"""Transformer blocks: pre-norm, post-norm and parallel.

All have one interface: `branches, residual = block(branches, residual)`. A sublayer's output that
has not been added to the residual stream yet is a branch; the add that closes a sublayer is fused
with the norm that opens the next, so a block receives the branches of the one before and hands its
own on (Dao et al., https://github.com/Dao-AILab/flash-attention, use the same order). The first
block receives the embeddings as its only branch and no residual; after the last, one more norm adds
what is left, `norm(*branches, residual)`.

Legend: B batch, T sequence, D model width.
"""

from torch import Tensor, nn

from flashtrain.modules.add_norm import DropoutAddNorm, ParallelDropoutAddNorm
from flashtrain.modules.attention import EMPTY_CONTEXT, Context, KVCache, MultiHeadAttention

Branches = tuple[Tensor, ...]


class Block(nn.Module):
    """Pre-norm: add + norm -> attention -> add + norm -> MLP."""

    def __init__(
        self,
        norm1: DropoutAddNorm,
        attention: MultiHeadAttention,
        norm2: DropoutAddNorm,
        mlp: nn.Module,
    ):
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp

    def forward(
        self,
        branches: Branches,
        residual_BTD: Tensor | None = None,
        *,
        context: Context = EMPTY_CONTEXT,
        cache: KVCache | None = None,
    ) -> tuple[Branches, Tensor | None]:
        """((branch [B, T, D],), residual [B, T, D] or None) -> ((MLP's output,), residual)."""
        (branch_BTD,) = branches
        hidden_BTD, residual_BTD = self.norm1(branch_BTD, residual_BTD)
        hidden_BTD = self.attention(hidden_BTD, context=context, cache=cache)
        hidden_BTD, residual_BTD = self.norm2(hidden_BTD, residual_BTD)
        return (self.mlp(hidden_BTD),), residual_BTD


class PostNormBlock(Block):
    """Post-norm (Vaswani et al. 2017): attention -> add + norm -> MLP -> add + norm.

    The sum is normalised and goes on as the only branch, with no residual beside it.
    """

    def forward(
        self,
        branches: Branches,
        residual_BTD: Tensor | None = None,
        *,
        context: Context = EMPTY_CONTEXT,
        cache: KVCache | None = None,
    ) -> tuple[Branches, Tensor | None]:
        """((hidden [B, T, D],), None) -> ((hidden,), None)."""
        (hidden_BTD,) = branches
        branch_BTD = self.attention(hidden_BTD, context=context, cache=cache)
        hidden_BTD, _ = self.norm1(branch_BTD, hidden_BTD)
        hidden_BTD, _ = self.norm2(self.mlp(hidden_BTD), hidden_BTD)
        return (hidden_BTD,), None


class ParallelBlock(nn.Module):
    """Attention and MLP side by side (GPT-J, GPT-NeoX, PaLM): x + attention(norm x) + MLP(norm x).

    Args:
        norm: adds the branches of the block before; the attention reads out0, the MLP out1.
    """

    def __init__(self, norm: ParallelDropoutAddNorm, attention: MultiHeadAttention, mlp: nn.Module):
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.mlp = mlp

    def forward(
        self,
        branches: Branches,
        residual_BTD: Tensor | None = None,
        *,
        context: Context = EMPTY_CONTEXT,
        cache: KVCache | None = None,
    ) -> tuple[Branches, Tensor | None]:
        """(one or two branches [B, T, D], residual) -> ((attention's, MLP's), residual)."""
        first_BTD, second_BTD = branches if len(branches) == 2 else (branches[0], None)
        out0_BTD, out1_BTD, residual_BTD = self.norm(first_BTD, second_BTD, residual_BTD)
        attended_BTD = self.attention(out0_BTD, context=context, cache=cache)
        return (attended_BTD, self.mlp(out1_BTD)), residual_BTD
