"""Dense layers and the MLP: `flashtrain.ops.fused_dense`."""

from flashtrain.ops.fused_dense import (
    FusedDense,
    FusedMLP,
    fused_dense_func,
    fused_mlp_func,
)

__all__ = [
    "FusedDense",
    "FusedMLP",
    "fused_dense_func",
    "fused_mlp_func",
]
