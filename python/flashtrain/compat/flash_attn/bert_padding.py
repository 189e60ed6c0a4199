"""Padded batches [B, S, ...] to the rows of their tokens alone, [total, ...], and back.

In plain torch. Legend: B batch, S padded length, total the tokens that are not padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtrain.ops._arguments import checked


@checked
def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of `input` [N, ...]: [len(indices), ...]."""
    return input.index_select(0, indices)


@checked
def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A tensor of first_axis_dim rows: `values` at `indices`, which differ, 0 elsewhere."""
    rows = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return rows.index_copy(0, indices.long(), values)


def _check_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    if mask.dim() != 2 or mask.shape != shape:
        raise ValueError(f"{name}: got shape {list(mask.shape)}; supported: {list(shape)}")


def _bounds(lengths: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens int32 [len(lengths) + 1], and the longest."""
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


@checked
def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one after the other.

    Args:
      hidden_states: [B, S, ...].
      attention_mask: bool or integers [B, S], 1 where a token is.
      unused_mask: like it, 1 where a token is kept and not used.

    Returns (hidden_states [total, ...], indices int64 [total], their rows among B S, cu_seqlens
    int32 [B + 1], the longest length, seqused int32 [B], the lengths by attention_mask alone).
    Copies the longest length to the host.
    """
    _check_mask("attention_mask", attention_mask, hidden_states.shape[:2])
    kept = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, attention_mask.shape)
        kept = attention_mask + unused_mask
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, longest = _bounds(kept.sum(-1, dtype=torch.int32))
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, longest, seqused


@checked
def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` of rows that hold several sequences one after the other, then padding.

    Args:
      hidden_states: [B, S, ...].
      attention_mask_in_length: integers [B, S]; those of a row that are not 0 are the lengths of
        its sequences, in order.

    Returns (hidden_states [total, ...], indices int64 [total], cu_seqlens int32 [sequences + 1],
    the longest length).
    """
    lengths = attention_mask_in_length
    _check_mask("attention_mask_in_length", lengths, hidden_states.shape[:2])
    positions = torch.arange(lengths.shape[1], device=lengths.device)
    indices = (positions < lengths.sum(-1, keepdim=True)).flatten().nonzero().flatten()
    cu_seqlens, longest = _bounds(lengths[lengths != 0])
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


@checked
def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch [batch, seqlen, ...] of `unpad_input`'s rows and indices, 0 for padding."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *hidden_states.shape[1:])
