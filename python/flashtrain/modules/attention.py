"""Multi-head attention.

Legend: B batch, T queries, S keys, D model width, H heads, G heads of keys and values, K head dim
(D = H * K).
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from flashtrain.ops.reference import attention as plain_attention
from flashtrain.ops.reference import rotary as plain_rotary


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """fp32 [H]: the slopes of Press et al. 2022 (https://arxiv.org/abs/2108.12409).

    For H a power of two, 2^(-8 i / H) for i = 1..H; else those of the next smaller power of two,
    and then every other one of twice that. Computed on the device: a CUDA graph can capture no copy
    from the host.
    """
    power = 1 << (num_heads.bit_length() - 1)
    options = {"dtype": torch.float64, "device": device}
    steps = torch.arange(1, power + 1, **options) / power
    if num_heads > power:
        between = torch.arange(1, 2 * (num_heads - power), 2, **options) / (2 * power)
        steps = torch.cat([steps, between])
    return torch.exp2(-8.0 * steps).float()


class KVCache:
    """Keys and values of one layer for the tokens so far, in memory for `capacity` of them.

    Args:
        batch, capacity, num_kv_heads, head_dim: the shape [B, capacity, G, K].
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (batch, capacity, num_kv_heads, head_dim)
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Takes T more tokens; all keys and all values, [B, length, G, K]."""
        start, self.length = self.length, self.length + k_BTGK.shape[1]
        self._keys[:, start : self.length] = k_BTGK
        self._values[:, start : self.length] = v_BTGK
        return self._keys[:, : self.length], self._values[:, : self.length]


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers of a model share about the tokens of one call; every field may be left out.

    Attributes:
        rotary: (cos, sin) of the tokens' positions, see `rotary_tables`; for self-attention.
        cu_seqlens: int32 [N + 1], bounds of the sequences among the B * T tokens, equal ones for
            none: each sequence sees itself alone.
        max_seqlen: no sequence of cu_seqlens is longer.
        mask: bool [B, 1, T, S], true where a query sees a key; with a KVCache only.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    mask: Tensor | None = None


EMPTY_CONTEXT = Context()


class MultiHeadAttention(nn.Module):
    """softmax(scale * q k^T + mask) v, with one packed projection for q, k and v.

    Its rows are H heads of q, then G of k, then G of v. With `cross`, the projection `q` reads the
    tokens and `kv` what they attend to.

    Args:
        d_model: width D, a multiple of num_heads.
        num_heads: H.
        num_kv_heads: G, of which num_heads is a multiple; H when None. G < H is grouped-query
            attention, G = 1 multi-query attention.
        cross: keys and values come from another sequence.
        causal: position t sees positions 0..t only.
        window: how many positions before and after its own a query sees; -1: without bound.
        alibi: subtract a multiple of the distance from the scores, see `alibi_slopes`.
        rotary_interleaved: pairs are neighbours (GPT-J), else (i, i + R / 2) (GPT-NeoX).
        dropout_p: probability of dropping an attention weight, in training only.
        softmax_scale: 1 / sqrt(K) when None.
        bias: of the projections.
        fused: use the kernels of `flashtrain.ops.rotary` and `flashtrain.ops.attention`.

    Raises:
        ValueError: head numbers do not divide what they should.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        cross: bool = False,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        alibi: bool = False,
        rotary_interleaved: bool = False,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        bias: bool = True,
        fused: bool = True,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if d_model % num_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of num_heads={num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = d_model // num_heads
        self.causal = causal
        self.window = window
        self.rotary_interleaved = rotary_interleaved
        self.dropout_p = dropout_p
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        kv_width = 2 * num_kv_heads * self.head_dim
        if cross:
            self.q = nn.Linear(d_model, d_model, bias=bias)
            self.kv = nn.Linear(d_model, kv_width, bias=bias)
        else:
            self.qkv = nn.Linear(d_model, d_model + kv_width, bias=bias)
        self.cross = cross
        self.fused = fused
        self.out = nn.Linear(d_model, d_model, bias=bias)
        self.alibi = alibi
        attention: Any = plain_attention
        rotary: Any = plain_rotary
        if fused:
            # Imported on demand: the plain model needs no compiled extension.
            from flashtrain.ops import attention, rotary
        self._flash_attn = attention.flash_attn_func
        self._flash_attn_varlen = attention.flash_attn_varlen_func
        self._rotate_qkv_ = rotary.apply_rotary_emb_qkv_

    def _project(
        self, x_BTD: Tensor, other_BSD: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k and v [B, S, G, K], the first two rotated."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if self.cross:
            q_BTHK = self.q(x_BTD).unflatten(-1, (-1, self.head_dim))
            kv = self.kv(other_BSD).unflatten(-1, (-1, self.head_dim))
            return q_BTHK, *kv.split(heads[1:], dim=-2)
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        if rotary is not None:
            qkv = self._rotate_packed(qkv, *rotary)
        q_BTHK, k_BTGK, v_BTGK = qkv.split(heads, dim=-2)
        return q_BTHK, k_BTGK, v_BTGK

    def _rotate_packed(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates q and k of [B, T, H + 2 G, K]; fused, in place and in one launch."""
        shape = qkv.shape
        if cos.ndim == 3:  # every row has positions of its own: all tokens as one sequence
            cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
            qkv = qkv.flatten(0, 1).unsqueeze(0)
        qkv = self._rotate_qkv_(
            qkv,
            cos,
            sin,
            interleaved=self.rotary_interleaved,
            num_heads_q=self.num_heads,
        )
        return qkv.view(shape)

    def _attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, context: Context) -> Tensor:
        """[B, T, H, K]."""
        dropout_p = self.dropout_p if self.training else 0.0
        # Made anew, not a buffer: to_empty and load_state_dict leave those undefined that no state
        # dict holds, and a model in a low precision would round them.
        slopes_H = alibi_slopes(self.num_heads, q_BTHK.device) if self.alibi else None
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window,
            "alibi_slopes": slopes_H,
        }
        if context.mask is not None:  # the kernels have no masks
            return plain_attention.flash_attn_func(
                q_BTHK, k_BSGK, v_BSGK, mask=context.mask, **options
            )
        if context.cu_seqlens is None:
            return self._flash_attn(q_BTHK, k_BSGK, v_BSGK, **options)
        if not self.fused:  # its mask is of a row, not of all tokens
            options["rows"] = q_BTHK.shape[0]
        y = self._flash_attn_varlen(
            *(t.flatten(0, 1) for t in (q_BTHK, k_BSGK, v_BSGK)),
            context.cu_seqlens,
            context.cu_seqlens,
            context.max_seqlen,
            context.max_seqlen,
            **options,
        )
        return y.view(q_BTHK.shape)

    def forward(
        self,
        x_BTD: Tensor,
        other_BSD: Tensor | None = None,
        *,
        context: Context = EMPTY_CONTEXT,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        Args:
            x_BTD: what asks.
            other_BSD: [B, S, D], what it attends to; for cross attention only.
            context: see `Context`.
            cache: takes this call's keys and values and gives those of the tokens before, too.
        """
        q_BTHK, k_BSGK, v_BSGK = self._project(x_BTD, other_BSD, context.rotary)
        if cache is not None:
            k_BSGK, v_BSGK = cache.append(k_BSGK, v_BSGK)
        y_BTHK = self._attend(q_BTHK, k_BSGK, v_BSGK, context)
        return self.out(y_BTHK.flatten(2))
