"""The keys of a ViT."""

import dataclasses

from flashtrain.errors import did_you_mean
from flashtrain.modules.mlp import ACTIVATIONS, GATES

POOLS = ("class_token", "mean")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides the model's shape and arithmetic.

    Attributes:
        image_size: height and width in pixels, a multiple of patch_size.
        patch_size: height and width of a patch, which becomes one token.
        num_channels: of the images.
        num_classes: labels are 0..num_classes-1.
        num_layers, d_model, num_heads: the shape; d_model is a multiple of num_heads.
        mlp_ratio: hidden width of the MLP over d_model.
        activation: of the MLP, see `GPTConfig`.
        pool: what the head reads: class_token, a learned token put before the patches, or the mean
            over the patches.
        dropout, attn_dropout: probabilities, in training only; of the embedding and each sublayer,
            and of attention weights.
        drop_path: probability of dropping a sublayer for a whole sample in the last block, rising
            linearly from 0 in the first (stochastic depth).
        layer_scale: first value of a learned factor for each column of a sublayer's output; 0: no
            such factor.
        layer_norm_eps: added to the variance.
        label_smoothing: in training, this share of the target is spread over all classes.
        residual_in_fp32: keep the residual stream in fp32 under bf16 or fp16.
        init_std: of the weights inside blocks and of the positions.
        activation_checkpointing: keep only each block's input for backward and compute the block
            again.
        fused: use the fused kernels; False: plain torch, the same numbers within rounding.
        fused_norm, fused_attention, fused_mlp: the same for one fusion each.
    """

    image_size: int
    patch_size: int
    num_channels: int
    num_classes: int
    num_layers: int
    d_model: int
    num_heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    pool: str = "class_token"
    dropout: float = 0.0
    attn_dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 0.0
    layer_norm_eps: float = 1e-6
    label_smoothing: float = 0.0
    residual_in_fp32: bool = False
    init_std: float = 0.02
    activation_checkpointing: bool = False
    fused: bool = True
    fused_norm: bool = True
    fused_attention: bool = True
    fused_mlp: bool = True

    def __post_init__(self) -> None:
        for name in (
            *("image_size", "patch_size", "num_channels", "num_classes"),
            *("num_layers", "d_model", "num_heads"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name, of in (("image_size", "patch_size"), ("d_model", "num_heads")):
            if getattr(self, name) % getattr(self, of):
                raise ValueError(
                    f"model.{name}={getattr(self, name)} is not a multiple of"
                    f" model.{of}={getattr(self, of)}"
                )
        for name in ("dropout", "attn_dropout", "drop_path", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be in [0, 1)")
        if not self.layer_scale >= 0.0:
            raise ValueError(f"model.layer_scale={self.layer_scale} must be at least 0")
        for name, valid in (("activation", (*ACTIVATIONS, *GATES)), ("pool", POOLS)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"model.{name}={value!r} is unknown; {did_you_mean(value, valid)}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_dropout(self) -> bool:
        return any((self.dropout, self.attn_dropout, self.drop_path))

    @property
    def seq_len(self) -> int:
        """Tokens of an image."""
        return self.num_patches + (self.pool == "class_token")
