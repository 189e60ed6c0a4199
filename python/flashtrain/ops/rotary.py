"""Rotary position embedding of queries and keys, forward and backward, on CPU and CUDA.

    out_a = a * cos - b * sin
    out_b = b * cos + a * sin

for pairs (a, b) of the first rotary_dim elements of each head: elements (i, i + rotary_dim / 2)
(GPT-NeoX), or (2i, 2i + 1) where interleaved (GPT-J). Functions and module have flash-attn's names
and arguments (`flash_attn.layers.rotary`); what is ours comes behind them, by keyword.
docs/rotary.md tells numerics, cost and errors.

Legend: B batch, S sequence length, T tokens of all sequences, H heads, D head dim, R rotary dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashtrain.ops._arguments import check_float, checked
from flashtrain.ops._rotary_ops import Rotary
from flashtrain.ops.rotary_scaling import RotaryScaling

_INDEX_DTYPES = (torch.int32, torch.int64)

# --- Checks ---------------------------------------------------------------------------------------


def _check_x(name: str, x: Tensor, shapes: dict[int, str]) -> None:
    """`shapes`: what is supported, by number of dimensions."""
    check_float(name, x)
    if x.dim() not in shapes:
        supported = ", ".join(shapes.values())
        raise ValueError(f"{name}: got shape {list(x.shape)}; supported: {supported}")


def _check_table(name: str, table: Tensor, cos: Tensor, x: Tensor) -> None:
    half = x.shape[-1] // 2
    if table.dim() != 2 or table.shape != cos.shape or not 1 <= table.shape[1] <= half:
        raise ValueError(
            f"{name}: got shape {list(table.shape)}; supported: [positions, R / 2], of all tables "
            f"the same, with R at most the head dim, {x.shape[-1]}"
        )
    if table.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"{name}: got dtype {table.dtype}; supported: torch.float32, {x.dtype}")
    if table.dtype != cos.dtype:
        raise ValueError(f"{name}: got dtype {table.dtype}; supported: that of cos, {cos.dtype}")
    if table.device != x.device:
        raise ValueError(f"{name}: is on {table.device}; supported: {x.device}, as x")
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad, and has no gradient here; supported: a tensor that does not, "
            f"{name}.detach()"
        )


def _check_index(name: str, index: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if index.dtype not in _INDEX_DTYPES:
        raise ValueError(f"{name}: got dtype {index.dtype}; supported: torch.int32, torch.int64")
    if index.shape != shape:
        raise ValueError(f"{name}: got shape {list(index.shape)}; supported: {list(shape)}")
    if index.device != x.device:
        raise ValueError(f"{name}: is on {index.device}; supported: {x.device}, as x")


def _check_range(first: int, length: int, table_len: int) -> None:
    if first < 0 or first + length > table_len:
        raise ValueError(
            f"seqlen_offsets: got {first}, so positions {first} to {first + length - 1}; "
            f"supported: those of the tables, 0 to {table_len - 1}"
        )


def _check_positions(
    x: Tensor,
    table_len: int,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    position_ids: Tensor | None,
) -> Tensor | None:
    """Returns position_ids as [B, S]."""
    is_tensor = isinstance(seqlen_offsets, Tensor)
    if position_ids is not None:
        if cu_seqlens is not None or is_tensor or seqlen_offsets != 0:
            raise ValueError(
                "position_ids: given with seqlen_offsets or cu_seqlens; supported: by itself"
            )
        if position_ids.dim() == 1 or (position_ids.dim() == 2 and position_ids.shape[0] == 1):
            position_ids = position_ids.expand(x.shape[0], *position_ids.shape[-1:])
        _check_index("position_ids", position_ids, tuple(x.shape[:2]), x)
        return position_ids
    num_sequences = x.shape[0]
    if cu_seqlens is not None:
        _check_index("cu_seqlens", cu_seqlens, (max(cu_seqlens.numel(), 1),), x)
        num_sequences = cu_seqlens.shape[0] - 1
        if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
            bounds = cu_seqlens.tolist()
            if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] > x.shape[0]:
                raise ValueError(
                    f"cu_seqlens: got {bounds}; supported: ascending, from 0 to at most "
                    f"{x.shape[0]}, the tokens"
                )
    if is_tensor:
        _check_index("seqlen_offsets", seqlen_offsets, (num_sequences,), x)
    elif cu_seqlens is None:
        _check_range(seqlen_offsets, x.shape[1], table_len)
    elif max_seqlen is not None:
        _check_range(seqlen_offsets, max_seqlen, table_len)
    return None


def _rotate(
    name: str,
    x: Tensor,
    tables: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    num_heads: tuple[int, int],
    interleaved: bool,
    inplace: bool,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    position_ids: Tensor | None,
) -> Tensor:
    cos = tables[0]
    for table_name, table in zip(("cos", "sin", "cos_k", "sin_k"), tables):
        if table is not None:
            _check_table(table_name, table, cos, x)
    position_ids = _check_positions(
        x, cos.shape[0], seqlen_offsets, cu_seqlens, max_seqlen, position_ids
    )
    if inplace and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name}: got elements {x.stride(-1)} apart in the last dimension; supported in place: "
            "adjacent"
        )
    if inplace and x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: is a leaf Variable that requires grad; supported in place: a computed tensor"
        )
    offset = 0 if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
    if offsets is not None and cu_seqlens is not None:
        offsets = offsets.to(cu_seqlens.dtype)
    return Rotary.apply(
        x, *tables, offsets, cu_seqlens, position_ids, *num_heads, offset, interleaved, inplace
    )


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
      max_seqlen: length of the longest sequence, only to check an int offset against the tables.
      position_ids: int32 or int64 [B, S], [1, S] or [S]: every token's position, in place of
        offsets.

    Returns x's shape and dtype; elements after the first R are copied.

    A position outside the tables is a ValueError, where it is on a GPU that only the device knows
    it, NaN for the rotated elements of that token. Saved for backward: tables and indices, not x.
    """
    shapes = {4: "[B, S, H, D]"} if cu_seqlens is None else {3: "[T, H, D] with cu_seqlens"}
    _check_x("x", x, shapes)
    # torch 2.11 compiles the gradient of an autograd.Function that writes to a view wrongly.
    copies = inplace and torch.compiler.is_compiling()
    out = _rotate(
        "x", x, (cos, sin, None, None), (x.shape[-2], 0), interleaved, inplace and not copies,
        seqlen_offsets, cu_seqlens, max_seqlen, position_ids,
    )  # fmt: skip
    return x.copy_(out) if copies else out


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
    _check_x("qkv", qkv, {dims + 1: packed, dims: flat})
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
        "qkv", qkv, (cos, sin, cos_k, sin_k), num_heads, interleaved, True, seqlen_offsets,
        cu_seqlens, max_seqlen, position_ids,
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
    _check_x("kv", kv, {dims: shape})
    if kv.shape[-3] != 2:
        raise ValueError(f"kv: got shape {list(kv.shape)}; supported: {shape}")
    return _rotate(
        "kv", kv, (cos, sin, None, None), (kv.shape[-2], 0), interleaved, True, seqlen_offsets,
        cu_seqlens, max_seqlen, position_ids,
    )  # fmt: skip


# --- Module ---------------------------------------------------------------------------------------


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys; makes and keeps the tables, in float32. No parameters, no state.

    Args:
      dim: R, even.
      base: frequencies are base**(-2i / R).
      interleaved: pairs are elements (2i, 2i + 1) rather than (i, i + R / 2).
      scale_base: XPos (Sun et al. 2022, arXiv:2212.10554), which the paper uses with 512: queries
        are scaled up and keys down as positions grow. None: off.
      device: where tables are made at first; they follow the queries.
      scaling: context extension, from flashtrain.ops.rotary_scaling; None: off.
    """

    @checked
    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        scaling: RotaryScaling | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim: got {dim}; supported: even, at least 2")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.scaling = scaling or RotaryScaling()
        self._tables: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None
        if device is not None:
            self.extend_tables(1, torch.device(device))

    def extend_tables(self, length: int, device: torch.device) -> None:
        """Makes tables of at least `length` positions on the device, if there are none yet.

        `forward` does it by itself; do it before a CUDA graph is captured.
        """
        have = self._tables[0] if self._tables is not None else None
        if have is not None and have.device == device and have.shape[0] >= length:
            return
        # Twice as long as before: tokens generated one by one do not make a table each.
        length = max(length, 2 * have.shape[0] if have is not None else 0)
        with torch.no_grad():
            self._tables = self._make_tables(length, device)

    def _make_tables(
        self, length: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """cos, sin, cos_k, sin_k [length, R / 2]; the last two None where they are the first."""
        # float64: in float32 the angle of position 100,000 is off by 0.004.
        t = torch.arange(length, dtype=torch.float64, device=device)
        angles = torch.outer(t, self.scaling.frequencies(self.dim, self.base).to(device))
        factor = self.scaling.table_factor
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if self.scale_base is None:
            return cos.float(), sin.float(), None, None
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device)
        decay = (pairs + 0.4 * self.dim) / (1.4 * self.dim)
        # Only differences of positions matter; around the middle, powers stay moderate.
        scale = decay ** ((t - length // 2) / self.scale_base).unsqueeze(-1)
        return (
            (cos * scale).float(),
            (sin * scale).float(),
            (cos / scale).float(),
            (sin / scale).float(),
        )

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
          max_seqlen: positions that occur, counted from 0: how long the tables must be. Needed
            where seqlen_offset is a tensor, with cu_seqlens and with position_ids.
          num_heads_q, cu_seqlens, position_ids: as there.
        """
        length = max_seqlen
        if length is None:
            if (
                isinstance(seqlen_offset, Tensor)
                or cu_seqlens is not None
                or (position_ids is not None)
            ):
                raise ValueError(
                    "max_seqlen: got None; it is needed with cu_seqlens, position_ids or a tensor "
                    "of offsets, whose values the host does not read"
                )
            length = max(t.shape[1] for t in (qkv, kv) if t is not None) + seqlen_offset
        self.extend_tables(length, qkv.device)
        assert self._tables is not None
        cos, sin, cos_k, sin_k = self._tables
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
