"""The keys of a GPT."""

import dataclasses

from flashtrain.errors.ranges import COUNT, POSITIVE, PROBABILITY, Range
from flashtrain.models.config_checks import (
    LAYERS,
    check_choice,
    check_fields,
    check_multiple,
    check_parameters,
)
from flashtrain.modules.add_norm import NORMS
from flashtrain.modules.mlp import ACTIVATIONS, GATES

_TABLES = ("vocab_size", "max_seq_len", "pad_vocab_size_multiple")
_RANGES = {
    **dict.fromkeys((*_TABLES, "d_model", "num_heads"), COUNT),
    **dict.fromkeys(("resid_dropout", "embd_dropout", "attn_dropout"), PROBABILITY),
    "num_layers": LAYERS,
    "rotary_fraction": Range(0, 1),
    "rotary_base": POSITIVE,
}
BLOCKS = ("pre_norm", "post_norm", "parallel", "parallel_tied_norm")


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the model's shape and arithmetic.

    Attributes:
        vocab_size: token ids are 0..vocab_size-1.
        num_layers, d_model, num_heads, max_seq_len: the shape; d_model is a multiple of num_heads.
        num_kv_heads: heads of keys and values, of which num_heads is a multiple; 0: num_heads.
        mlp_ratio: hidden width of the MLP over d_model.
        pad_vocab_size_multiple: the tables' rows are rounded up to it, which matrix units prefer;
            the added columns of the logits are -inf, so neither loss nor sampling depends on it.
        activation: of the MLP: gelu, gelu_approx (tanh), relu, sqrelu, or gated: glu, geglu,
            swiglu.
        block: pre_norm; post_norm, which has no final norm; parallel (attention and MLP side by
            side) with two norms or, parallel_tied_norm, one.
        norm: layer_norm or rms_norm.
        learned_positions: add a learned vector for each position to the embedding.
        rotary_fraction: share of each head that is rotated by its position, 0 for none.
        rotary_base: the longest wave length over 2 pi.
        rotary_interleaved: rotate neighbouring components (GPT-J), else halves (GPT-NeoX).
        alibi: attention scores fall with distance.
        window: tokens a token sees, itself among them; 0: all before it.
        resid_dropout, embd_dropout, attn_dropout: probabilities, in training only.
        layer_norm_eps: added to the variance.
        residual_in_fp32: keep the residual stream in fp32 under bf16 or fp16.
        scale_attn_by_inverse_layer_idx: divide the softmax scale of layer i (from 0) by i + 1.
        tie_embeddings: the head shares the token table.
        init_std: of every weight matrix; what projects into the residual stream gets
            init_std / sqrt(2 num_layers).
        activation_checkpointing: keep only each block's input for backward and compute the block
            again; a third more work for a fraction of the memory.
        fused: use the fused kernels; False: plain torch, the same numbers within rounding.
        fused_norm, fused_attention, fused_mlp, fused_loss: the same for one fusion each: dropout +
            add + norm, rotary and attention, matmul + bias + activation, head + cross entropy.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    max_seq_len: int
    num_kv_heads: int = 0
    mlp_ratio: float = 4.0
    pad_vocab_size_multiple: int = 128
    activation: str = "gelu_approx"
    block: str = "pre_norm"
    norm: str = "layer_norm"
    learned_positions: bool = True
    rotary_fraction: float = 0.0
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False
    alibi: bool = False
    window: int = 0
    resid_dropout: float = 0.0
    embd_dropout: float = 0.0
    attn_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    residual_in_fp32: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    activation_checkpointing: bool = False
    fused: bool = True
    fused_norm: bool = True
    fused_attention: bool = True
    fused_mlp: bool = True
    fused_loss: bool = True

    def __post_init__(self) -> None:
        check_fields(self, _RANGES)
        self._check_sizes()
        check_choice(self, "activation", (*ACTIVATIONS, *GATES))
        check_choice(self, "block", BLOCKS)
        check_choice(self, "norm", NORMS)
        if self.block == "post_norm" and self.residual_in_fp32:
            raise ValueError(
                "model.residual_in_fp32 goes with a residual stream, which model.block=post_norm "
                "does not have; set it to false"
            )

    def _check_sizes(self) -> None:
        check_multiple(self, "d_model", "num_heads")
        if self.num_kv_heads:
            check_multiple(self, "num_heads", "num_kv_heads")
        if self.d_ff < 1:
            raise ValueError(
                f"model.mlp_ratio={self.mlp_ratio} leaves the MLP no width; at least 1 /"
                f" model.d_model"
            )
        block = self.d_model * (2 * self.d_model + 2 * self.d_ff)
        rows = self.padded_vocab_size + self.max_seq_len * self.learned_positions
        check_parameters(
            self,
            self.num_layers * block + rows * self.d_model,
            ("num_layers", "d_model", "mlp_ratio", *_TABLES),
        )

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return (self.vocab_size + multiple - 1) // multiple * multiple

    @property
    def d_ff(self) -> int:
        """Hidden width of the MLP."""
        return round(self.mlp_ratio * self.d_model)

    @property
    def has_dropout(self) -> bool:
        return any((self.resid_dropout, self.embd_dropout, self.attn_dropout))

    @property
    def rotary_dim(self) -> int:
        """Components of a head that are rotated, an even number."""
        return int(self.rotary_fraction * (self.d_model // self.num_heads)) // 2 * 2
