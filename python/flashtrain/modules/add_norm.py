"""Dropout + residual add + LayerNorm, the glue between two sublayers.

Legend: B batch, T sequence, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropoutAddNorm(nn.Module):
    """x = dropout(branch) + residual;  z = LayerNorm(x).

    Fused, the residual stream is read once and written once; unfused, the same numbers (within
    rounding) come from three plain torch ops.

    Args:
        d_model: width D of the residual stream.
        dropout_p: probability of dropping an element of the branch, in training only.
        eps: added to the variance.
        residual_in_fp32: where there is no residual yet, start it in fp32.
        fused: use the kernel of `flashtrain.ops.layer_norm`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        dropout_p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        fused: bool = True,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.dropout_p = dropout_p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.fused = fused
        if fused:
            # Imported on demand: the plain model needs no compiled extension.
            from flashtrain.ops.layer_norm import dropout_add_layer_norm

            self._dropout_add_layer_norm = dropout_add_layer_norm

    def forward(self, branch_BTD: Tensor, residual_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (z, x), both [B, T, D]: the sublayer's input and the residual stream.

        z has the dtype of the branch; x that of the residual or, without one, of the branch.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        if self.fused:
            return self._dropout_add_layer_norm(
                branch_BTD,
                residual_BTD,
                self.weight,
                self.bias,
                dropout_p,
                self.eps,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
            )
        x_BTD = F.dropout(branch_BTD, dropout_p)
        if residual_BTD is not None:
            x_BTD = (x_BTD + residual_BTD).to(residual_BTD.dtype)
        elif self.residual_in_fp32:
            x_BTD = x_BTD.float()
        dtype = torch.promote_types(x_BTD.dtype, self.weight.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        z_BTD = F.layer_norm(x_BTD.to(dtype), weight.shape, weight, bias, self.eps)
        return z_BTD.to(branch_BTD.dtype), x_BTD

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, dropout_p={self.dropout_p}, fused={self.fused}"
