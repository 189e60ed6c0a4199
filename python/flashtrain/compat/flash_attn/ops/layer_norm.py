"""LayerNorm with dropout and residual: `flashtrain.ops.layer_norm`."""

from flashtrain.ops.layer_norm import (
    DropoutAddLayerNorm,
    DropoutAddLayerNormParallelResidual,
    dropout_add_layer_norm,
    dropout_add_layer_norm_parallel_residual,
    dropout_add_layer_norm_subset,
    layer_norm,
)

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddLayerNormParallelResidual",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "dropout_add_layer_norm_subset",
    "layer_norm",
]
