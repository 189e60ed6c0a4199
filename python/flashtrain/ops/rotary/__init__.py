"""Rotary position embedding of queries and keys, forward and backward, on CPU and CUDA.

    out_a = a * cos - b * sin
    out_b = b * cos + a * sin

for pairs (a, b) of the first rotary_dim elements of each head: elements (i, i + rotary_dim / 2)
(GPT-NeoX), or (2i, 2i + 1) where interleaved (GPT-J). Functions and module have flash-attn's names
and arguments (`flash_attn.layers.rotary`); what is ours comes behind them, by keyword.
docs/rotary.md describes numerics, cost and errors.

Legend: B batch, S sequence length, T tokens of all sequences, H heads, D head dim, R rotary dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtrain.ops._arguments import checked
from flashtrain.ops.rotary.checks import check_in_place, check_positions, check_table, check_x
from flashtrain.ops.rotary.kernels import Rotary
from flashtrain.ops.rotary.tables import RotaryTables, Tables


def _rotate(
    name: str,
    x: Tensor,
    tables: Tables,
    num_heads: tuple[int, int],
    interleaved: bool,
    inplace: bool,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    cos = tables.cos
    for table_name, table in zip(Tables._fields, tables):
        if table is not None:
            check_table(table_name, table, cos, x)
    position_ids = check_positions(x, cos.shape[0], seqlen_offsets, cu_seqlens, position_ids)
    if inplace:
        check_in_place(name, x)
    offset = 0 if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
    if offsets is not None and cu_seqlens is not None:
        offsets = offsets.to(cu_seqlens.dtype)
    # Compilers lose or mistake the gradient of an autograd.Function that writes to an input of
    # the graph, or to a view; they make a write in place of a copy where they can.
    copies = inplace and torch.compiler.is_compiling()
    out = Rotary.apply(
        x, *tables, offsets, cu_seqlens, position_ids, *num_heads, offset, interleaved,
        inplace and not copies,
    )  # fmt: skip
    return x.copy_(out) if copies else out


# --- Public functions -----------------------------------------------------------------------------


@checked
def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotates the first R elements of every head of x.

    Args:
      x: [B, S, H, D], with cu_seqlens [T, H, D]; float32, float16 or bfloat16; any strides.
      cos, sin: [positions, R / 2], float32 or x's dtype; R at most D. Without gradient.
      interleaved: pairs are elements (2i, 2i + 1) rather than (i, i + R / 2).
      inplace: write to x, and return it; its elements must be adjacent in the last dimension.
      seqlen_offsets: the position of each sequence's first token: an int, or int32 or int64 [B] (of
        cu_seqlens' sequences).
      cu_seqlens: int32 or int64 [sequences + 1]: sequence b is x[cu_seqlens[b]:cu_seqlens[b + 1]].
        Tokens after the last sequence are copied.
      max_seqlen: length of the longest sequence, or more; not needed.
      position_ids: int32 or int64 [B, S], [1, S] or [S]: every token's position, in place of
        offsets.

    Returns x's shape and dtype; elements after the first R are copied.

    A position outside the tables is a ValueError, where it is on a GPU that only the device knows
    it, NaN for the rotated elements of that token. Saved for backward: tables and indices, not x.
    """
    shapes = {4: "[B, S, H, D]"} if cu_seqlens is None else {3: "[T, H, D] with cu_seqlens"}
    check_x("x", x, shapes)
    return _rotate(
        "x", x, Tables(cos, sin), (x.shape[-2], 0), interleaved, inplace, seqlen_offsets,
        cu_seqlens, position_ids,
    )  # fmt: skip


apply_rotary_emb_func = apply_rotary_emb  # as older code for flash-attn calls it


@checked
def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotates queries and keys of a packed tensor in place, in one launch, and returns it.

    Args:
      qkv: [B, S, 3, H, D], or [B, S, Hq + 2 Hk, D] with num_heads_q; with cu_seqlens
        [T, 3, H, D] or [T, Hq + 2 Hk, D].
      cos_k, sin_k: tables of the keys where they differ (XPos); both or neither.
      num_heads_q: Hq.

    The rest is as in `apply_rotary_emb`. The gradient is a new tensor.
    """
    tokens, dims = ("B, S", 4) if cu_seqlens is None else ("T", 3)
    packed = f"[{tokens}, 3, H, D]"
    flat = f"[{tokens}, Hq + 2 Hk, D] with num_heads_q"
    check_x("qkv", qkv, {dims + 1: packed, dims: flat})
    if (cos_k is None) != (sin_k is None):
        raise ValueError("cos_k, sin_k: got one of them; supported: both or neither")
    if qkv.dim() == dims + 1:
        if qkv.shape[-3] != 3:
            raise ValueError(f"qkv: got shape {list(qkv.shape)}; supported: {packed}")
        num_heads = (qkv.shape[-2], qkv.shape[-2])
    else:
        total = qkv.shape[-2]
        if num_heads_q is None or not 0 <= num_heads_q <= total or (total - num_heads_q) % 2:
            raise ValueError(
                f"num_heads_q: got {num_heads_q}, for qkv {list(qkv.shape)}; supported: Hq of "
                f"[{tokens}, Hq + 2 Hk, D]"
            )
        num_heads = (num_heads_q, (total - num_heads_q) // 2)
    return _rotate(
        "qkv", qkv, Tables(cos, sin, cos_k, sin_k), num_heads, interleaved, True, seqlen_offsets,
        cu_seqlens, position_ids,
    )  # fmt: skip


@checked
def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotates the keys of kv [B, S, 2, H, D] (with cu_seqlens [T, 2, H, D]) in place; returns kv.

    The rest is as in `apply_rotary_emb_qkv_`.
    """
    shape, dims = ("[B, S, 2, H, D]", 5) if cu_seqlens is None else ("[T, 2, H, D]", 4)
    check_x("kv", kv, {dims: shape})
    if kv.shape[-3] != 2:
        raise ValueError(f"kv: got shape {list(kv.shape)}; supported: {shape}")
    return _rotate(
        "kv", kv, Tables(cos, sin), (kv.shape[-2], 0), interleaved, True, seqlen_offsets,
        cu_seqlens, position_ids,
    )  # fmt: skip


# --- Module ---------------------------------------------------------------------------------------


class RotaryEmbedding(RotaryTables):
    """Rotates queries and keys; makes and keeps the tables, in float32. No parameters, no state.

    Args:
      dim: R, even.
      base: frequencies are base**(-2i / R).
      interleaved: pairs are elements (2i, 2i + 1) rather than (i, i + R / 2).
      scale_base: XPos (Sun et al. 2022, arXiv:2212.10554), which the paper uses with 512: queries
        are scaled down and keys up as positions grow. None: off.
      device: where tables are made at first; they follow the queries.
      scaling: context extension, from flashtrain.ops.rotary.scaling; None: off.

    Tables that a compiled graph, a capture or a mode such as FakeTensorMode makes serve that call
    alone. Those that are kept stay for as long as the module does, as CUDA graphs may read them.
    """

    def _num_positions(
        self,
        tokens: int,
        seqlen_offset: int | Tensor,
        max_seqlen: int | None,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
    ) -> int:
        """How long tables must be: max_seqlen, or less where the host knows that less will do."""
        is_tensor = isinstance(seqlen_offset, Tensor)
        if max_seqlen is None and (is_tensor or not (cu_seqlens is position_ids is None)):
            raise ValueError(
                "max_seqlen: got None; it is needed with cu_seqlens, position_ids or a tensor "
                "of offsets, whose values the host does not read"
            )
        indices = seqlen_offset if position_ids is None else position_ids
        if not isinstance(indices, Tensor):
            known = tokens + indices
            return known if max_seqlen is None else min(known, max_seqlen)
        assert max_seqlen is not None
        if (
            max_seqlen > self._seq_len_cached
            and indices.is_cpu
            and type(indices) is Tensor
            and indices.numel() > 0
            and not torch.compiler.is_compiling()
        ):
            past = 1 if position_ids is not None else tokens
            return min(max_seqlen, int(indices.max()) + past)
        return max_seqlen

    @checked
    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place, and returns qkv or, where kv is given, (q, kv).

        Args:
          qkv: as in `apply_rotary_emb_qkv_`; where kv is given, the queries alone, as x of
            `apply_rotary_emb`.
          kv: as in `apply_rotary_emb_kv_`.
          seqlen_offset: as seqlen_offsets there.
          max_seqlen: positions that occur, counted from 0, or more: how long the tables must be.
            Needed where seqlen_offset is a tensor, with cu_seqlens and with position_ids.
          num_heads_q, cu_seqlens, position_ids: as there.
        """
        dim = 1 if cu_seqlens is None else 0
        tokens = max(t.shape[dim] if t.dim() > dim else 0 for t in (qkv, kv) if t is not None)
        length = self._num_positions(tokens, seqlen_offset, max_seqlen, cu_seqlens, position_ids)
        is_fake = type(qkv) is not Tensor and torch._C._len_torch_dispatch_stack() > 0
        cos, sin, cos_k, sin_k = self._tables_for(length, qkv.device, anew=is_fake)
        where = {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q, **where
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset, **where)
        if cos_k is not None and sin_k is not None:
            cos, sin = cos_k, sin_k
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset, **where)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, base={self.base}, interleaved={self.interleaved}, "
            f"scale_base={self.scale_base}, scaling={self.scaling}"
        )
