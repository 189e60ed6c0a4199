"""GPT-2 and GPT-3: decoder-only transformers, and what others have changed of them since.

Legend: B batch, T sequence, D model width, H heads, K head dim, V vocabulary with its padding.

Cost per token, forward and backward: 6 N + 12 L T D floating-point operations, N parameters without
the position table, attention counted whole though half of it is masked (PaLM, appendix B).

    config = GPTConfig(
        vocab_size=50257, num_layers=12, d_model=768, num_heads=12, max_seq_len=1024
    )
    loss = GPT(config)(tokens_BT, targets_BT)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashtrain.models.gpt_config import GPTConfig
from flashtrain.modules.add_norm import DropoutAddNorm, NormParameters, ParallelDropoutAddNorm
from flashtrain.modules.attention import Context, KVCache, MultiHeadAttention
from flashtrain.modules.block import Block, Branches, ParallelBlock, PostNormBlock
from flashtrain.modules.embedding import TokenPositionEmbedding
from flashtrain.modules.head import LanguageModelHead
from flashtrain.modules.mlp import build_mlp
from flashtrain.ops.reference.rotary import rotary_tables

__all__ = ["GPT", "GPTConfig"]


def _check_tied_weights(
    model: "GPT",
    state: Mapping[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """A hook of load_state_dict: where the head shares the token table, the state has one table."""
    names = [f"{prefix}embedding.tokens.weight", f"{prefix}head.weight"]
    tensors = [state[name] for name in names if type(state.get(name)) in (Tensor, nn.Parameter)]
    if not model.config.tie_embeddings or len(tensors) < 2 or any(t.is_meta for t in tensors):
        return
    if not torch.equal(*tensors):
        errors.append(
            f"{names[1]} differs from {names[0]}, but model.tie_embeddings=True makes them one; "
            "supported: a model with tie_embeddings=False"
        )


def _tie_again(model: "GPT", incompatible_keys: Any) -> None:
    """A hook of load_state_dict."""
    model._tie_weights()


class GPT(nn.Module):
    """The language model: tokens in, logits or loss out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = TokenPositionEmbedding(
            config.vocab_size,
            config.max_seq_len if config.learned_positions else None,
            config.d_model,
            config.padded_vocab_size,
        )
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.num_layers))
        self.norm: Any = self._final_norm()
        self.head = LanguageModelHead(
            config.d_model,
            config.vocab_size,
            config.padded_vocab_size,
            fused=config.fused and config.fused_loss,
        )
        self._tie_weights()
        self.register_load_state_dict_pre_hook(_check_tied_weights)
        self.register_load_state_dict_post_hook(_tie_again)  # assign=True makes two of one
        self.reset_parameters()

    def _tie_weights(self) -> None:
        table = self.embedding.tokens.weight
        if self.config.tie_embeddings and isinstance(table, nn.Parameter):
            self.head.weight = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPT":
        """What to_empty and all conversions go through; where they make new parameters, the table
        and the head would each get one."""
        super()._apply(fn, recurse)
        self._tie_weights()
        return self

    def _norm(self, dropout_p: float) -> DropoutAddNorm:
        config = self.config
        return DropoutAddNorm(
            config.d_model,
            norm=config.norm,
            dropout_p=dropout_p,
            eps=config.layer_norm_eps,
            residual_in_fp32=config.residual_in_fp32,
            fused=config.fused and config.fused_norm,
        )

    def _parallel_norm(self, dropout_p: float, tied: bool) -> ParallelDropoutAddNorm:
        config = self.config
        return ParallelDropoutAddNorm(
            config.d_model,
            norm=config.norm,
            tied=tied,
            dropout_p=dropout_p,
            eps=config.layer_norm_eps,
            residual_in_fp32=config.residual_in_fp32,
            fused=config.fused and config.fused_norm,
        )

    def _final_norm(self) -> nn.Module | None:
        config = self.config
        if config.block == "post_norm":
            return None
        if config.block == "pre_norm":
            return self._norm(config.resid_dropout)
        return self._parallel_norm(config.resid_dropout, tied=True)

    def _block(self, layer_idx: int) -> nn.Module:
        config = self.config
        softmax_scale = (config.d_model // config.num_heads) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            softmax_scale /= layer_idx + 1
        attention = MultiHeadAttention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads or None,
            causal=True,
            window=(config.window - 1, 0) if config.window else (-1, -1),
            alibi=config.alibi,
            rotary_interleaved=config.rotary_interleaved,
            dropout_p=config.attn_dropout,
            softmax_scale=softmax_scale,
            fused=config.fused and config.fused_attention,
        )
        mlp = build_mlp(
            config.d_model, config.d_ff, config.activation, fused=config.fused and config.fused_mlp
        )
        # A block opens with the dropout of what came before it: the embedding for the first.
        opening_dropout = config.embd_dropout if layer_idx == 0 else config.resid_dropout
        if config.block == "pre_norm":
            norms = self._norm(opening_dropout), self._norm(config.resid_dropout)
            return Block(norms[0], attention, norms[1], mlp)
        if config.block == "post_norm":
            norms = self._norm(config.resid_dropout), self._norm(config.resid_dropout)
            return PostNormBlock(norms[0], attention, norms[1], mlp)
        tied = config.block == "parallel_tied_norm"
        return ParallelBlock(self._parallel_norm(opening_dropout, tied), attention, mlp)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation, drawn from torch's default generator."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, NormParameters):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Embedding) and module is not self.head:
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=std)
        # 2 L branches add up in the residual stream; this keeps its variance independent of L.
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp.fc2):
                nn.init.normal_(projection.weight, std=std / math.sqrt(2 * self.config.num_layers))
        for table in {self.embedding.tokens.weight, self.head.weight}:
            table[self.config.vocab_size :].zero_()

    def _context(
        self,
        tokens_BT: Tensor,
        documents_BC: Tensor | None,
        positions: Tensor | None,
        mask_B1TS: Tensor | None,
    ) -> Context:
        """What the layers share."""
        config = self.config
        batch, seq_len = tokens_BT.shape
        rotary = cu_seqlens = None
        if config.rotary_dim:
            if positions is None:
                positions = torch.arange(seq_len, device=tokens_BT.device)
            is_fp64 = self.head.weight.dtype == torch.float64
            dtype = torch.float64 if is_fp64 else torch.float32
            rotary = rotary_tables(positions, config.rotary_dim, config.rotary_base, dtype)
        if documents_BC is not None:
            rows_B1 = torch.arange(
                0, batch * seq_len, seq_len, dtype=torch.int32, device=tokens_BT.device
            ).unsqueeze(1)
            cu_seqlens = F.pad((documents_BC + rows_B1).flatten(), (0, 1), value=batch * seq_len)
        return Context(rotary, cu_seqlens, seq_len, mask_B1TS)

    def hidden_states(
        self,
        tokens_BT: Tensor,
        *,
        documents_BC: Tensor | None = None,
        positions: Tensor | None = None,
        mask_B1TS: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """int64 [B, T] -> the head's input [B, T, D].

        Args:
            tokens_BT, documents_BC, positions: see `forward`.
            mask_B1TS: bool [B, 1, T, S], which of the S tokens in the caches a token sees.
            caches: one for each layer, which take these tokens, too.
        """
        context = self._context(tokens_BT, documents_BC, positions, mask_B1TS)
        branches: Branches = (self.embedding(tokens_BT, positions),)
        residual_BTD = None
        if self.config.block == "post_norm":  # its blocks open with no norm that would do it
            branches = (F.dropout(branches[0], self.config.embd_dropout, self.training),)
        recompute = self.config.activation_checkpointing and self.training
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches is not None else None
            if recompute:
                # Without dropout there is no random state to keep, which a CUDA graph could not.
                branches, residual_BTD = checkpoint(
                    block,
                    branches,
                    residual_BTD,
                    context=context,
                    use_reentrant=False,
                    preserve_rng_state=self.config.has_dropout,
                )
            else:
                branches, residual_BTD = block(branches, residual_BTD, context=context, cache=cache)
        return branches[0] if self.norm is None else self.norm(*branches, residual_BTD)[0]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V], -inf in the padding columns."""
        return self.head(hidden_BTD)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        documents_BC: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or with targets their loss.

        Args:
            tokens_BT: int64 [B, T], T at most max_seq_len where positions are learned.
            targets_BT: int64 [B, T] of the tokens to predict, -100 for none; or None.
            documents_BC: int32 [B, C], where in its window each document starts, ascending, the
                first at 0, filled up with T; a token then sees its own document only. None: each
                window is one document.
            positions_BT: int64 [B, T], positions of the tokens; None: 0..T-1.

        Returns:
            Without targets the logits, in the model's or autocast's dtype; with targets the mean
            cross entropy in nats, a scalar in fp32 (fp64 for an fp64 model). Both ways go through
            the module's call, so DistributedDataParallel and torch.compile may wrap it.

        Raises:
            ValueError: T is larger than the table of positions, or a token, target or position is
                outside its range; on CUDA the latter ends in a device-side assertion or, a target
                under fused_loss, in a loss of NaN.
        """
        hidden_BTD = self.hidden_states(
            tokens_BT, documents_BC=documents_BC, positions=positions_BT
        )
        if targets_BT is None:
            return self.head(hidden_BTD)
        return self.head.loss(hidden_BTD, targets_BT)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats, see `forward`."""
        return self(tokens_BT, targets_BT)

    def num_parameters(self, with_positions: bool = False) -> int:
        """Parameters, shared ones once; rows that pad the vocabulary are not counted."""
        config = self.config
        total = sum(p.numel() for p in self.parameters())
        tables = 1 if config.tie_embeddings else 2
        total -= tables * (config.padded_vocab_size - config.vocab_size) * config.d_model
        if with_positions or self.embedding.positions is None:
            return total
        return total - self.embedding.positions.weight.numel()

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations per token, forward and backward: 6 N + 12 L T D."""
        config = self.config
        return 6 * self.num_parameters() + 12 * config.num_layers * seq_len * config.d_model

    def generate(
        self,
        prompt_BT: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        *,
        top_p: float | None = None,
    ) -> Tensor:
        """See `flashtrain.models.generation.generate`."""
        from flashtrain.models.generation import generate  # here: it knows this class

        return generate(
            self,
            prompt_BT,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
