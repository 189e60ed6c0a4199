"""Causal multi-head self-attention.

Legend: B batch, T sequence, D model width, H heads, K head dim (D = H * K).
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's kernel is the fastest on Hopper (328 against 207 TFLOP/s forward at 32 x 1024 x 12 x 64);
# what it does not support falls through to the next one.
_HOPPER_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention_kernels(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which attention runs on the fastest kernel that torch has for the device.

    Entering it costs tens of microseconds on the host, so a model does it once for all its layers.
    """
    # Of the ways to ask for it, torch.compile folds this one into a constant.
    if device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9:
        return sdpa_kernel(_HOPPER_BACKENDS, set_priority=True)
    return contextlib.nullcontext()


class CausalSelfAttention(nn.Module):
    """softmax(scale * q k^T + causal mask) v, with one packed projection for q, k and v.

    Args:
        d_model: width D, a multiple of num_heads.
        num_heads: H.
        dropout_p: probability of dropping an attention weight, in training only.
        softmax_scale: 1 / sqrt(K) when None.

    Raises:
        ValueError: d_model is not a multiple of num_heads.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
    ):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.dropout_p = dropout_p
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; position t sees positions 0..t."""
        q_BHTK, k_BHTK, v_BHTK = (
            self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        )
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHTK,
            v_BHTK,
            dropout_p=self.dropout_p if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
        )
        return self.out(y_BHTK.transpose(1, 2).flatten(2))
