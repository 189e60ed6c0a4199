"""Fused dropout + add + LayerNorm / RMSNorm, forward and backward, on CPU and CUDA.

    x = layerscale * dropout(rowscale * x0) + residual
    z = norm(x) * weight + bias

The public functions have flash-attn's names and arguments (`flash_attn.ops.layer_norm`,
`flash_attn.ops.rms_norm`). docs/layer_norm.md tells numerics, cost and errors.

Dtypes: x0 float32, float16 or bfloat16; residual, and with it x, float32 or x0's; weight, bias and
layerscale all float32 or all x0's; rowscale float32 or x0's. z has x0's dtype. All arithmetic is
float32. `torch.autocast` changes nothing here: mixed dtypes are this op's normal input, and casts
would only add passes over memory.

D is the hidden size; the leading dimensions count as rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashtrain.ops._layer_norm_ops import DropoutAddNorm, Norm

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, x0: Tensor) -> None:
    """`dtype` is what is supported besides float32."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}; supported: {list(shape)}, to fit x0 "
            f"{list(x0.shape)}"
        )
    if tensor.dtype != dtype and tensor.dtype != torch.float32:
        raise ValueError(f"{name}: got dtype {tensor.dtype}; supported: torch.float32 or {dtype}")
    if tensor.device != x0.device:
        raise ValueError(f"{name}: is on {tensor.device}; supported: x0's device, {x0.device}")


def _check_arguments(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
) -> None:
    if x0.dtype not in _FLOAT_DTYPES:
        supported = ", ".join(map(str, _FLOAT_DTYPES))
        raise ValueError(f"x0: got dtype {x0.dtype}; supported: {supported}")
    if not (x0.is_cuda or x0.is_cpu or x0.is_meta):
        raise ValueError(f"x0: is on {x0.device}; supported: cpu, cuda")
    if x0.dim() == 0 or x0.shape[-1] == 0:
        raise ValueError(
            f"x0: got shape {list(x0.shape)}; supported: [..., D] with D, the size that is "
            "normalised, at least 1"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; supported: at least 0 and less than 1")
    columns = x0.shape[-1:]
    _check("weight", weight, columns, x0.dtype, x0)
    if residual is not None:
        _check("residual", residual, x0.shape, x0.dtype, x0)
    for name, vector in (("bias", bias), ("layerscale", layerscale)):
        if vector is not None:
            _check(name, vector, columns, x0.dtype, x0)
            if vector.dtype != weight.dtype:
                raise ValueError(
                    f"{name}: got dtype {vector.dtype}; supported: weight's, {weight.dtype}"
                )
    if rowscale is not None:
        _check("rowscale", rowscale, x0.shape[:-1], x0.dtype, x0)
        if rowscale.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "rowscale: requires grad, and has no gradient here; supported: a tensor that does "
                "not, rowscale.detach()"
            )


def _dropout_add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    *,
    is_rms_norm: bool,
    zero_centered_weight: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    _check_arguments(x0, residual, weight, bias, dropout_p, rowscale, layerscale)
    x_dtype = torch.float32 if residual_in_fp32 else x0.dtype
    if residual is not None:
        x_dtype = residual.dtype
    use_dropout = dropout_p > 0.0

    mask = None
    if (
        residual is None
        and rowscale is None
        and layerscale is None
        and not use_dropout
        and x_dtype == x0.dtype
    ):
        x = x0
        z = Norm.apply(x0, weight, bias, epsilon, is_rms_norm, zero_centered_weight)
    else:
        rng_state = None
        if use_dropout:
            # {seed, offset} on the op's device, from torch's own generator of it: manual_seed, CUDA
            # graphs, torch.compile and checkpointing treat it as any random number.
            rng_state = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=x0.device)
        z, x, mask = DropoutAddNorm.apply(
            x0,
            residual,
            weight,
            bias,
            rowscale,
            layerscale,
            rng_state,
            dropout_p,
            epsilon,
            is_rms_norm,
            zero_centered_weight,
            x_dtype,
            return_dropout_mask and use_dropout,
        )
    if not prenorm and not return_dropout_mask:
        return z
    if not return_dropout_mask:
        return z, x
    if mask is None:
        mask = torch.ones_like(x0, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return (z, x, mask) if prenorm else (z, mask)


# --- Public functions -----------------------------------------------------------------------------


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """z = LayerNorm(x) * weight + bias of x = layerscale * dropout(rowscale * x0) + residual.

    Args:
      x0: [..., D], float32, float16 or bfloat16; the output of the sublayer before.
      residual: like x0, in float32 or x0's dtype; None: nothing is added.
      weight: [D], float32 or x0's dtype.
      bias: [D], weight's dtype; None: no bias.
      dropout_p: probability in [0, 1) of zeroing an element; survivors are scaled by 1 / (1 - p).
        The caller passes 0 in evaluation.
      epsilon: added to the (biased) variance.
      rowscale: [...], a factor for each row, before dropout (stochastic depth). Without gradient.
      layerscale: [D], weight's dtype, a factor for each column, after dropout.
      prenorm: also return x, the residual stream, in the residual's dtype.
      residual_in_fp32: without a residual, x is kept in float32 (with one, its dtype decides).
      return_dropout_mask: also return the mask, uint8 like x0, 1 = kept.

    Returns z, or the tuple (z[, x][, mask]); z has x0's shape and dtype.

    Any strides are taken: rows that are strided are read as they are, all else is copied. Saved for
    backward: x, weight, mean and rstd (float32 [...]), the scales, two integers in place of the
    mask, and x0 where layerscale needs a gradient. Only gradients that are required are computed.

    Raises:
      ValueError: an argument does not fit; its name, what came, what is supported.
      RuntimeError: the device reported an error.
    """
    return _dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=False,
    )  # fmt: skip


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`dropout_add_layer_norm` with z = x / sqrt(mean(x^2) + epsilon) * weight + bias."""
    return _dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm,
        residual_in_fp32, return_dropout_mask, is_rms_norm=True,
    )  # fmt: skip


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """LayerNorm(x) * weight + bias over the last dimension; as `dropout_add_layer_norm`."""
    return _dropout_add_norm(x, None, weight, bias, 0.0, epsilon, is_rms_norm=False)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; as `dropout_add_rms_norm`."""
    return _dropout_add_norm(x, None, weight, None, 0.0, epsilon, is_rms_norm=True)


# --- Modules --------------------------------------------------------------------------------------


class DropoutAddLayerNorm(nn.Module):
    """dropout + add + LayerNorm with parameters weight and bias [hidden_size].

    Args:
      hidden_size: D.
      prenorm: return (z, x) rather than z.
      p: dropout probability, used in training mode only.
      eps: added to the variance.
      residual_in_fp32: keep x in float32 where no residual is passed.
    """

    _norm = staticmethod(dropout_add_layer_norm)
    _has_bias = True

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
        if self._has_bias:
            self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        return self._norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, prenorm={self.prenorm}, p={self.p}, eps={self.eps}"


class DropoutAddRMSNorm(DropoutAddLayerNorm):
    """dropout + add + RMSNorm with parameter weight [hidden_size] and no bias."""

    _norm = staticmethod(dropout_add_rms_norm)
    _has_bias = False


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

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        return _dropout_add_norm(
            x,
            residual,
            self.weight,
            None,
            self.dropout_p if self.training else 0.0,
            self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            is_rms_norm=True,
            zero_centered_weight=self.zero_centered_weight,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, dropout_p={self.dropout_p}"
