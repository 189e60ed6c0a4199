"""ViT (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929): images in, classes out.

Legend: B batch, C channels, I image height and width, T tokens, D model width, Y classes.

    shape = {"image_size": 224, "patch_size": 16, "num_channels": 3, "num_classes": 1000}
    config = ViTConfig(**shape, **SIZES["B"])
    loss = ViT(config)(images_BCII, labels_B)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashtrain.models.vit_config import ViTConfig
from flashtrain.modules.add_norm import DropoutAddNorm, NormParameters
from flashtrain.modules.attention import MultiHeadAttention
from flashtrain.modules.block import Block, Branches
from flashtrain.modules.embedding import PatchEmbedding, to_autocast_dtype
from flashtrain.modules.ids import outside
from flashtrain.modules.mlp import build_mlp

__all__ = ["SIZES", "ViT", "ViTConfig"]

SIZES: dict[str, dict[str, Any]] = {
    "Ti": {"num_layers": 12, "d_model": 192, "num_heads": 3},
    "S": {"num_layers": 12, "d_model": 384, "num_heads": 6},
    "B": {"num_layers": 12, "d_model": 768, "num_heads": 12},
    "L": {"num_layers": 24, "d_model": 1024, "num_heads": 16},
}


class ViT(nn.Module):
    """The image classifier."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config.patch_size, config.num_channels, config.d_model)
        self.class_token: Any = None
        if config.pool == "class_token":
            self.class_token = nn.Parameter(torch.empty(config.d_model))
        self.positions = nn.Parameter(torch.empty(config.seq_len, config.d_model))
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.num_layers))
        self.norm = self._norm(config.num_layers)
        self.head = nn.Linear(config.d_model, config.num_classes)
        self.reset_parameters()

    def _norm(self, layer_idx: int, *, inside: bool = False) -> DropoutAddNorm:
        """The norm that adds the MLP of the block before, or inside a block its attention."""
        config = self.config
        adds_embedding = layer_idx == 0 and not inside
        branch_idx = layer_idx if inside else layer_idx - 1  # the block whose branch is added
        depth = branch_idx / max(1, config.num_layers - 1)
        return DropoutAddNorm(
            config.d_model,
            dropout_p=config.dropout,
            drop_path_p=0.0 if adds_embedding else config.drop_path * depth,
            layer_scale=None if adds_embedding else config.layer_scale or None,
            eps=config.layer_norm_eps,
            residual_in_fp32=config.residual_in_fp32,
            fused=config.fused and config.fused_norm,
        )

    def _block(self, layer_idx: int) -> Block:
        config = self.config
        return Block(
            self._norm(layer_idx),
            MultiHeadAttention(
                config.d_model,
                config.num_heads,
                dropout_p=config.attn_dropout,
                fused=config.fused and config.fused_attention,
            ),
            self._norm(layer_idx, inside=True),
            build_mlp(
                config.d_model,
                config.d_ff,
                config.activation,
                fused=config.fused and config.fused_mlp,
            ),
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal weights; a head of zeros, so that a new model knows no class."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, NormParameters):
                module.reset_parameters()
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        # Patches come out with the variance that they have.
        projection = self.patches.projection
        nn.init.trunc_normal_(projection.weight, std=projection.in_features**-0.5)
        nn.init.zeros_(projection.bias)
        nn.init.trunc_normal_(self.positions, std=std)
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)  # its position distinguishes it
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, images_BCII: Tensor) -> Tensor:
        """Images as `forward` takes them -> the head's input [B, D]."""
        hidden_BTD = self.patches(images_BCII)
        if self.class_token is not None:
            tokens_B1D = self.class_token.to(hidden_BTD.dtype).expand(len(hidden_BTD), 1, -1)
            hidden_BTD = torch.cat([tokens_B1D, hidden_BTD], dim=1)
        branches: Branches = (to_autocast_dtype(hidden_BTD + self.positions),)
        residual_BTD: Any = None
        recompute = self.config.activation_checkpointing and self.training
        for block in self.blocks:
            if recompute:
                # Without dropout there is no random state to keep, which a CUDA graph could not.
                branches, residual_BTD = checkpoint(
                    block,
                    branches,
                    residual_BTD,
                    use_reentrant=False,
                    preserve_rng_state=self.config.has_dropout,
                )
            else:
                branches, residual_BTD = block(branches, residual_BTD)
        branch_BTD = branches[0]
        if self.class_token is not None:  # the other tokens have done their part
            branch_BTD, residual_BTD = branch_BTD[:, :1], residual_BTD[:, :1]
        hidden_BTD, _ = self.norm(branch_BTD, residual_BTD)
        return hidden_BTD.mean(dim=1)

    def forward(self, images_BCII: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Logits [B, Y], or with labels their loss.

        Args:
            images_BCII: [B, C, I, I]: uint8 0..255, which is scaled to -1..1; or floats as they are
                to be used.
            labels_B: int64 [B], or None.

        Returns:
            Without labels the logits, in the model's or autocast's dtype; with labels the mean
            cross entropy in nats, a scalar in fp32 (fp64 for an fp64 model), in training with
            label_smoothing.

        Raises:
            ValueError: the images have another shape, or a label is no class; on CUDA the latter is
                a device-side assertion.
        """
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if images_BCII.ndim != 4 or images_BCII.shape[1:] != expected:
            raise ValueError(
                f"images: got shape {list(images_BCII.shape)}; supported: [B, {config.num_channels}"
                f", {config.image_size}, {config.image_size}]"
            )
        logits_BY = self.head(self.features(images_BCII))
        if labels_B is None:
            return logits_BY
        if logits_BY.dtype != torch.float64:
            logits_BY = logits_BY.float()
        smoothing = config.label_smoothing if self.training else 0.0
        try:
            return F.cross_entropy(logits_BY, labels_B, label_smoothing=smoothing)
        except IndexError as error:
            raise outside("label", labels_B, config.num_classes, ignored=-100) or error from None

    def num_parameters(self, with_positions: bool = False) -> int:
        """Parameters; those of the positions where asked for."""
        total = sum(p.numel() for p in self.parameters())
        return total if with_positions else total - self.positions.numel()

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations per token, forward and backward: 6 N + 12 L T D."""
        config = self.config
        return 6 * self.num_parameters() + 12 * config.num_layers * seq_len * config.d_model
