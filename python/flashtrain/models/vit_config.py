"""The keys of a ViT."""

import dataclasses

from flashtrain.errors.ranges import COUNT, PROBABILITY
from flashtrain.models.config_checks import (
    LAYERS,
    check_choice,
    check_fields,
    check_multiple,
    check_parameters,
)
from flashtrain.modules.mlp import ACTIVATIONS, GATES

_SIZES = ("image_size", "patch_size", "num_channels", "num_classes", "d_model", "num_heads")
_RANGES = {
    **dict.fromkeys(_SIZES, COUNT),
    **dict.fromkeys(("dropout", "attn_dropout", "drop_path", "label_smoothing"), PROBABILITY),
    "num_layers": LAYERS,
}
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
        check_fields(self, _RANGES)
        check_multiple(self, "image_size", "patch_size")
        check_multiple(self, "d_model", "num_heads")
        check_choice(self, "activation", (*ACTIVATIONS, *GATES))
        check_choice(self, "pool", POOLS)
        if self.d_ff < 1:
            raise ValueError(
                f"model.mlp_ratio={self.mlp_ratio} leaves the MLP no width; at least 1 /"
                f" model.d_model"
            )
        block = self.d_model * (4 * self.d_model + 2 * self.d_ff)
        rows = self.num_channels * self.patch_size**2 + self.seq_len + self.num_classes
        check_parameters(
            self,
            self.num_layers * block + rows * self.d_model,
            ("num_layers", "d_model", "mlp_ratio", "image_size", "patch_size", "num_classes"),
        )

    @property
    def d_ff(self) -> int:
        """Hidden width of the MLP."""
        return round(self.mlp_ratio * self.d_model)

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
