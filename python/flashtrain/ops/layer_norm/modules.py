"""The modules of flashtrain.ops.layer_norm, where they are public."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashtrain.ops._arguments import checked
from flashtrain.ops.layer_norm import calls
from flashtrain.ops.layer_norm.calls import NormOptions


class DropoutAddLayerNorm(nn.Module):
    """dropout + add + LayerNorm with parameters weight and bias [hidden_size].

    Args:
      hidden_size: D.
      prenorm: return (z, x) rather than z.
      p: dropout probability, used in training mode only.
      eps: added to the variance.
      residual_in_fp32: keep x in float32 where no residual is passed.
    """

    _is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        if not self._is_rms_norm:
            self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @checked
    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        z, x, _ = calls.dropout_add_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            NormOptions(self.eps, self._is_rms_norm),
            residual_in_fp32=self.residual_in_fp32,
        )
        return (z, x) if self.prenorm else z

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, prenorm={self.prenorm}, p={self.p}, eps={self.eps}"


class DropoutAddRMSNorm(DropoutAddLayerNorm):
    """dropout + add + RMSNorm with parameter weight [hidden_size] and no bias."""

    _is_rms_norm = True


class DropoutAddLayerNormParallelResidual(nn.Module):
    """dropout + add of two branches, and a LayerNorm for each of the two branches that follow.

    Parameters weight0, bias0 and, unless the norm is tied, weight1, bias1 [hidden_size].

    Args:
      hidden_size: D.
      tied_norm: one norm for both; z1 is then None.
      prenorm: return (z0, z1, x) rather than (z0, z1).
      p: dropout probability, used in training mode only.
      eps: added to the variance.
      residual_in_fp32: keep x in float32 where no residual is passed.
    """

    _is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        tied_norm: bool = False,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        names = ["weight0", "weight1", "bias0", "bias1"]
        for name in names:
            absent = (tied_norm and name[-1] == "1") or (self._is_rms_norm and name[0] == "b")
            value = None if absent else torch.empty(hidden_size, device=device, dtype=dtype)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.0 if name.startswith("weight") else 0.0)

    @checked
    def forward(
        self, x0: Tensor, x1: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        z0, z1, x, _, _ = calls.dropout_add_norm_parallel(
            x0,
            x1,
            residual,
            self.weight0,
            self.bias0,
            self.weight1,
            self.bias1,
            self.p if self.training else 0.0,
            NormOptions(self.eps, self._is_rms_norm, suffix="0"),
            residual_in_fp32=self.residual_in_fp32,
        )
        return (z0, z1, x) if self.prenorm else (z0, z1)

    def extra_repr(self) -> str:
        tied = self.weight1 is None
        return f"{self.weight0.shape[0]}, tied_norm={tied}, prenorm={self.prenorm}, p={self.p}"


class DropoutAddRMSNormParallelResidual(DropoutAddLayerNormParallelResidual):
    """The same with RMSNorm: parameters weight0 and, unless tied, weight1; no biases."""

    _is_rms_norm = True


class RMSNorm(nn.Module):
    """RMSNorm with parameter weight [hidden_size], after dropout and add where asked for.

    Args:
      hidden_size: D.
      eps: added to the mean square.
      dropout_p: dropout probability, used in training mode only.
      zero_centered_weight: scale by 1 + weight, with weight starting at 0, so that weight decay
        pulls the scale to 1.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout_p = dropout_p
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    @checked
    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        z, x, _ = calls.dropout_add_norm(
            x,
            residual,
            self.weight,
            None,
            self.dropout_p if self.training else 0.0,
            NormOptions(self.eps, True, self.zero_centered_weight, x0_name="x"),
            residual_in_fp32=residual_in_fp32,
        )
        return (z, x) if prenorm else z

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, dropout_p={self.dropout_p}"
