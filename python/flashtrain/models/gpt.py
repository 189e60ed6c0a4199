"""GPT-2 and GPT-3: decoder-only transformers, pre-norm, learned positions, tied head.

Legend: B batch, T sequence, D model width, V vocabulary with its padding.

Cost per token, forward and backward: 6 N + 12 L T D floating-point operations, N parameters without
the position table, attention counted whole though half of it is masked (PaLM, appendix B).

    config = GPTConfig(
        vocab_size=50257, num_layers=12, d_model=768, num_heads=12, max_seq_len=1024
    )
    loss = GPT(config)(tokens_BT, targets_BT)
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtrain.modules.add_norm import DropoutAddNorm
from flashtrain.modules.attention import CausalSelfAttention, attention_kernels
from flashtrain.modules.block import Block
from flashtrain.modules.embedding import TokenPositionEmbedding
from flashtrain.modules.mlp import Mlp


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the model's shape and arithmetic.

    Attributes:
        vocab_size: token ids are 0..vocab_size-1.
        num_layers, d_model, num_heads, max_seq_len: the shape; d_model is a multiple of num_heads.
        mlp_ratio: hidden width of the MLP over d_model.
        pad_vocab_size_multiple: the tables' rows are rounded up to it, which matrix units prefer;
            the added columns of the logits are -inf, so neither loss nor sampling depends on it.
        activation: of the MLP: gelu, gelu_approx (tanh), relu or sqrelu.
        resid_dropout, embd_dropout, attn_dropout: probabilities, in training only.
        layer_norm_eps: added to the variance.
        residual_in_fp32: keep the residual stream in fp32 under bf16 or fp16.
        scale_attn_by_inverse_layer_idx: divide the softmax scale of layer i (from 0) by i + 1.
        tie_embeddings: the head shares the token table.
        init_std: of every weight matrix; what projects into the residual stream gets
            init_std / sqrt(2 num_layers).
        fused: use the fused kernels; False: plain torch, the same numbers within rounding.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    max_seq_len: int
    mlp_ratio: int = 4
    pad_vocab_size_multiple: int = 128
    activation: str = "gelu_approx"
    resid_dropout: float = 0.0
    embd_dropout: float = 0.0
    attn_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    residual_in_fp32: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    fused: bool = True

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "num_layers", "d_model", "num_heads", "max_seq_len"),
            *("mlp_ratio", "pad_vocab_size_multiple"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model={self.d_model} is not a multiple of"
                f" model.num_heads={self.num_heads}"
            )
        for name in ("resid_dropout", "embd_dropout", "attn_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be in [0, 1)")

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return (self.vocab_size + multiple - 1) // multiple * multiple


class GPT(nn.Module):
    """The language model: tokens in, logits or loss out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        vocab_size = config.padded_vocab_size
        self.embedding = TokenPositionEmbedding(vocab_size, config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.num_layers))
        self.norm = self._norm(config.resid_dropout)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.tokens.weight
        # Added to the logits in the matmul's epilogue: 0 for tokens, -inf for padding columns.
        padding_mask = torch.zeros(vocab_size)
        padding_mask[config.vocab_size :] = -math.inf
        self.register_buffer("padding_mask", padding_mask, persistent=False)
        self.reset_parameters()

    def _norm(self, dropout_p: float) -> DropoutAddNorm:
        return DropoutAddNorm(
            self.config.d_model,
            dropout_p=dropout_p,
            eps=self.config.layer_norm_eps,
            residual_in_fp32=self.config.residual_in_fp32,
            fused=self.config.fused,
        )

    def _block(self, layer_idx: int) -> Block:
        config = self.config
        softmax_scale = (config.d_model // config.num_heads) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            softmax_scale /= layer_idx + 1
        return Block(
            # A block opens with the dropout of what came before it: the embedding for the first.
            norm1=self._norm(config.embd_dropout if layer_idx == 0 else config.resid_dropout),
            attention=CausalSelfAttention(
                config.d_model,
                config.num_heads,
                dropout_p=config.attn_dropout,
                softmax_scale=softmax_scale,
            ),
            norm2=self._norm(config.resid_dropout),
            mlp=Mlp(
                config.d_model, config.mlp_ratio * config.d_model, activation=config.activation
            ),
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation, drawn from torch's default generator."""
        std = self.config.init_std
        for module in self.modules():
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

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] -> the head's input [B, T, D]."""
        hidden_BTD, residual_BTD = self.embedding(tokens_BT), None
        with attention_kernels(tokens_BT.device):
            for block in self.blocks:
                hidden_BTD, residual_BTD = block(hidden_BTD, residual_BTD)
        hidden_BTD, _ = self.norm(hidden_BTD, residual_BTD)
        return hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V], -inf in the padding columns."""
        if self.config.padded_vocab_size == self.config.vocab_size:
            return self.head(hidden_BTD)
        return F.linear(hidden_BTD, self.head.weight, self.padding_mask.to(self.head.weight.dtype))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V], or with targets their loss.

        Args:
            tokens_BT: int64 [B, T], T at most max_seq_len.
            targets_BT: int64 [B, T] of the tokens to predict, or None.

        Returns:
            Without targets the logits, in the model's or autocast's dtype; with targets the mean
            cross entropy in nats, a scalar in fp32 (fp64 for an fp64 model). Both ways go through
            the module's call, so DistributedDataParallel and torch.compile may wrap it.

        Raises:
            ValueError: T is larger than max_seq_len.
        """
        logits_BTV = self.logits(self.hidden_states(tokens_BT))
        if targets_BT is None:
            return logits_BTV
        if logits_BTV.dtype != torch.float64:
            logits_BTV = logits_BTV.float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats, see `forward`."""
        return self(tokens_BT, targets_BT)

    def num_parameters(self, with_positions: bool = False) -> int:
        """Parameters, shared ones once; rows that pad the vocabulary are not counted."""
        config = self.config
        total = sum(p.numel() for p in self.parameters())
        tables = 1 if config.tie_embeddings else 2
        total -= tables * (config.padded_vocab_size - config.vocab_size) * config.d_model
        return total if with_positions else total - self.embedding.positions.weight.numel()

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations per token, forward and backward: 6 N + 12 L T D."""
        config = self.config
        return 6 * self.num_parameters() + 12 * config.num_layers * seq_len * config.d_model

    @torch.no_grad()
    def generate(
        self,
        prompt_BT: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues prompts of one length; beyond max_seq_len the oldest tokens leave the window.

        Args:
            prompt_BT: int64 [B, T], T at least 1.
            max_new_tokens: how many tokens to add to each prompt.
            temperature: divides the logits; 0 is greedy decoding.
            top_k: sample among the k likeliest tokens only; None among all.
            generator: source of randomness, on the prompt's device; torch's default when None.

        Returns:
            int64 [B, T + max_new_tokens], the prompts included.

        Raises:
            ValueError: an empty prompt, a negative temperature or a top_k below 1.
        """
        if prompt_BT.shape[1] < 1:
            raise ValueError("the prompt is empty; give at least one token")
        if temperature < 0.0:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or larger")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        was_training = self.training
        self.eval()
        try:
            tokens_BT = prompt_BT
            for _ in range(max_new_tokens):
                window_BT = tokens_BT[:, -self.config.max_seq_len :]
                last_BV = self.logits(self.hidden_states(window_BT)[:, -1:])[:, 0].float()
                next_B1 = _sample(last_BV, temperature, top_k, generator)
                tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
            return tokens_BT
        finally:
            self.train(was_training)


def _sample(
    logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """fp32 [B, V] -> int64 [B, 1]."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1, generator=generator)
