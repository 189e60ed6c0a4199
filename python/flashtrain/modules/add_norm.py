"""Dropout + residual add + norm, the glue between two sublayers.

Legend: B batch, T sequence, D model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtrain.errors import did_you_mean

NORMS = ("layer_norm", "rms_norm")


def _plain_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """LayerNorm, or without a bias RMSNorm."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps).to(out_dtype)
    return F.layer_norm(x, weight.shape, weight, bias.to(dtype), eps).to(out_dtype)


def _plain_add(x_BTD: Tensor, residual_BTD: Tensor | None, residual_in_fp32: bool) -> Tensor:
    if residual_BTD is not None:
        return (x_BTD + residual_BTD).to(residual_BTD.dtype)
    return x_BTD.float() if residual_in_fp32 and x_BTD.dtype != torch.float64 else x_BTD


class NormParameters(nn.Module):
    """Weight and, for LayerNorm, bias [D]."""

    def __init__(self, d_model: int, norm: str):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is unknown; {did_you_mean(norm, NORMS)}")
        self.weight = nn.Parameter(torch.ones(d_model))
        has_bias = norm == "layer_norm"
        self.bias: Any = nn.Parameter(torch.zeros(d_model)) if has_bias else None

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DropoutAddNorm(NormParameters):
    """x = layer_scale * dropout(drop_path(branch)) + residual;  z = norm(x).

    Fused, the residual stream is read once and written once; unfused, the same numbers (within
    rounding) come from plain torch ops.

    Args:
        d_model: width D of the residual stream.
        norm: layer_norm or rms_norm.
        dropout_p: probability of dropping an element of the branch, in training only.
        drop_path_p: probability of dropping a sample's whole branch, in training only (stochastic
            depth, Huang et al. 2016); what is kept is divided by 1 - drop_path_p.
        layer_scale: first value of a learned factor for each column of the branch (Touvron et al.
            2021), None for no such factor.
        eps: added to the variance.
        residual_in_fp32: where there is no residual yet, start it in fp32.
        fused: use the kernel of `flashtrain.ops.layer_norm`.

    Raises:
        ValueError: there is no such norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        norm: str = "layer_norm",
        dropout_p: float = 0.0,
        drop_path_p: float = 0.0,
        layer_scale: float | None = None,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        fused: bool = True,
    ):
        super().__init__(d_model, norm)
        self.layer_scale = (
            None if layer_scale is None else nn.Parameter(torch.full((d_model,), layer_scale))
        )
        self._first_layer_scale = layer_scale
        self.dropout_p = dropout_p
        self.drop_path_p = drop_path_p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.fused = fused
        if fused:
            # Imported on demand: the plain model needs no compiled extension.
            from flashtrain.ops import layer_norm as ops

            self._layer_norm, self._rms_norm = ops.dropout_add_layer_norm, ops.dropout_add_rms_norm

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, the layer scale its first value."""
        super().reset_parameters()
        if self.layer_scale is not None:
            nn.init.constant_(self.layer_scale, self._first_layer_scale)

    def _row_scale(self, branch_BTD: Tensor) -> Tensor | None:
        """[B, T] of 0 and 1 / (1 - drop_path_p), equal within a sample."""
        if not self.training or self.drop_path_p == 0.0:
            return None
        keep = 1.0 - self.drop_path_p
        kept_B = branch_BTD.new_empty(branch_BTD.shape[0]).bernoulli_(keep) / keep
        return kept_B.unsqueeze(1).expand(branch_BTD.shape[:2]).contiguous()

    def forward(self, branch_BTD: Tensor, residual_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (z, x), both [B, T, D]: the sublayer's input and the residual stream.

        z has the dtype of the branch; x that of the residual or, without one, of the branch.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        row_scale_BT = self._row_scale(branch_BTD)
        if self.fused:
            function = self._rms_norm if self.bias is None else self._layer_norm
            return function(
                branch_BTD,
                residual_BTD,
                self.weight,
                self.bias,
                dropout_p,
                self.eps,
                row_scale_BT,
                self.layer_scale,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
            )
        x_BTD = branch_BTD
        if row_scale_BT is not None:
            x_BTD = x_BTD * row_scale_BT.unsqueeze(-1)
        x_BTD = F.dropout(x_BTD, dropout_p)
        if self.layer_scale is not None:
            x_BTD = x_BTD * self.layer_scale
        x_BTD = _plain_add(x_BTD, residual_BTD, self.residual_in_fp32)
        if residual_BTD is None and not self.residual_in_fp32:
            x_BTD = x_BTD.to(branch_BTD.dtype)  # layer_scale may have widened it
        return _plain_norm(x_BTD, self.weight, self.bias, self.eps, branch_BTD.dtype), x_BTD

    def extra_repr(self) -> str:
        return (
            f"{self.weight.numel()}, dropout_p={self.dropout_p}, drop_path_p={self.drop_path_p}, "
            f"fused={self.fused}"
        )


class ParallelDropoutAddNorm(NormParameters):
    """x = dropout(branch0) + dropout(branch1) + residual;  z0, z1 = norm0(x), norm1(x).

    The glue between two parallel blocks: both branches of one are added, and both of the next read
    the sum, through one norm (tied) or two.

    Args:
        d_model, norm, dropout_p, eps, residual_in_fp32, fused: see `DropoutAddNorm`.
        tied: there is one norm, and z1 is z0.
    """

    def __init__(
        self,
        d_model: int,
        *,
        norm: str = "layer_norm",
        tied: bool = False,
        dropout_p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        fused: bool = True,
    ):
        super().__init__(d_model, norm)
        self.norm1: Any = None if tied else NormParameters(d_model, norm)
        self.dropout_p = dropout_p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.fused = fused
        if fused:
            from flashtrain.ops import layer_norm as ops

            self._layer_norm = ops.dropout_add_layer_norm_parallel_residual
            self._rms_norm = ops.dropout_add_rms_norm_parallel_residual

    def reset_parameters(self) -> None:
        """Weights 1, biases 0."""
        super().reset_parameters()
        if self.norm1 is not None:
            self.norm1.reset_parameters()

    def _fused(
        self,
        branch0_BTD: Tensor,
        branch1_BTD: Tensor | None,
        residual_BTD: Tensor | None,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        function: Any = self._rms_norm if self.bias is None else self._layer_norm
        z0_BTD, z1_BTD, x_BTD = function(
            branch0_BTD,
            branch1_BTD,
            residual_BTD,
            self.weight,
            self.bias,
            None if self.norm1 is None else self.norm1.weight,
            None if self.norm1 is None else self.norm1.bias,
            dropout_p,
            self.eps,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
        )
        return z0_BTD, z0_BTD if z1_BTD is None else z1_BTD, x_BTD

    def forward(
        self, branch0_BTD: Tensor, branch1_BTD: Tensor | None, residual_BTD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (z0, z1, x), all [B, T, D]; dtypes as `DropoutAddNorm` has them."""
        dropout_p = self.dropout_p if self.training else 0.0
        if self.fused:
            return self._fused(branch0_BTD, branch1_BTD, residual_BTD, dropout_p)
        x_BTD = F.dropout(branch0_BTD, dropout_p)
        if branch1_BTD is not None:
            x_BTD = x_BTD + F.dropout(branch1_BTD, dropout_p)
        x_BTD = _plain_add(x_BTD, residual_BTD, self.residual_in_fp32)
        z0_BTD = _plain_norm(x_BTD, self.weight, self.bias, self.eps, branch0_BTD.dtype)
        if self.norm1 is None:
            return z0_BTD, z0_BTD, x_BTD
        z1_BTD = _plain_norm(x_BTD, self.norm1.weight, self.norm1.bias, self.eps, branch0_BTD.dtype)
        return z0_BTD, z1_BTD, x_BTD
