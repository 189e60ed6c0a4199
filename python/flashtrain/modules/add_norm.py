"""Dropout + residual add + norm, the glue between two sublayers.

Legend: B batch, T sequence, D model width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.errors import did_you_mean
from flashtrain.ops.reference import layer_norm as reference

NORMS = ("layer_norm", "rms_norm")


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
    """residual_out = layer_scale * dropout(drop_path(branch)) + residual;  out is its norm.

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
        self._add_norm: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = reference.add_norm
        if fused:
            # Imported on demand: the plain model needs no compiled extension.
            from flashtrain.ops.layer_norm import add_norm

            self._add_norm = add_norm

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
        """Returns (out, residual_out), both [B, T, D]: the sublayer's input, the residual stream.

        out has the dtype of the branch; residual_out that of the residual or, without one, of the
        branch.
        """
        out_BTD, residual_out_BTD, _ = self._add_norm(
            branch_BTD,
            residual_BTD,
            self.weight,
            self.bias,
            self.dropout_p if self.training else 0.0,
            self.eps,
            rowscale=self._row_scale(branch_BTD),
            layerscale=self.layer_scale,
            is_rms_norm=self.bias is None,
            residual_in_fp32=self.residual_in_fp32,
        )
        return out_BTD, residual_out_BTD

    def extra_repr(self) -> str:
        return (
            f"{self.weight.numel()}, dropout_p={self.dropout_p}, drop_path_p={self.drop_path_p}, "
            f"fused={self.fused}"
        )


class ParallelDropoutAddNorm(NormParameters):
    """residual_out = dropout(branch0) + dropout(branch1) + residual;  out0, out1 are its norms.

    The glue between two parallel blocks: both branches of one are added, and both of the next read
    the sum, through one norm (tied) or two.

    Args:
        d_model, norm, dropout_p, eps, residual_in_fp32, fused: see `DropoutAddNorm`.
        tied: there is one norm, and out1 is out0.
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
        self._add_norm: Callable[..., tuple[Tensor | None, ...]] = reference.parallel_add_norm
        if fused:
            from flashtrain.ops.layer_norm.parallel import parallel_add_norm

            self._add_norm = parallel_add_norm

    def reset_parameters(self) -> None:
        """Weights 1, biases 0."""
        super().reset_parameters()
        if self.norm1 is not None:
            self.norm1.reset_parameters()

    def forward(
        self, branch0_BTD: Tensor, branch1_BTD: Tensor | None, residual_BTD: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (out0, out1, residual_out), all [B, T, D]; dtypes as of `DropoutAddNorm`."""
        results: Any = self._add_norm(
            branch0_BTD,
            branch1_BTD,
            residual_BTD,
            self.weight,
            self.bias,
            None if self.norm1 is None else self.norm1.weight,
            None if self.norm1 is None else self.norm1.bias,
            self.dropout_p if self.training else 0.0,
            self.eps,
            is_rms_norm=self.bias is None,
            residual_in_fp32=self.residual_in_fp32,
        )
        out0_BTD, out1_BTD, residual_out_BTD, *_ = results
        return out0_BTD, out0_BTD if out1_BTD is None else out1_BTD, residual_out_BTD
