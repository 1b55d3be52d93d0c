"""Attention of one block over pages on the CPU by the kernels of fused blocks, which copy nothing of a context."""

from __future__ import annotations

import torch

from petalsd import _C
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.ragged import RaggedBatch
from petalsd.ops.score_rule import ScoreRule

_DTYPES = (torch.float32, torch.bfloat16)
_MAX_HEAD_DIM = 512


def has_native_order(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the CPU's kernels read pages of such heads, for blocks that compute in ``dtype``."""
    return dtype in _DTYPES and head_dim <= _MAX_HEAD_DIM and head_dim % 2 == 0


def native_attention(
    team: _C.LayerTeam,
    queries_keys_values: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kv: HeadMajorKV,
    batch: RaggedBatch,
    place: tuple[int, int | None],
    scale: float,
    rule: ScoreRule | None = None,
) -> torch.Tensor:
    """Put the new tokens' keys and values into their pages, and attend as ``ops.attention.paged_attention``.

    queries_keys_values  q ``[T, H, D]`` and k, v ``[T, Hkv, D]``, in the model's dtype, rotated where it does that
    place                index of the block, and its window

    Returns ``[T, H, D]``. Queries are rounded as in fused blocks beside pages of their dtype; all else is float32.
    KVPoolError for heads that do not fit the pages.
    """
    block, window = place
    q, k, v = (states.float().contiguous() for states in queries_keys_values)
    out = torch.empty_like(q)
    positions, origins = batch.positions.contiguous(), batch.origins.contiguous()
    if positions.dtype != torch.int64 or origins.dtype != torch.int32:
        raise ValueError("native attention reads positions in int64, and origins in int32")
    slopes, sinks = _per_head(rule)
    alibi = None if rule is None else rule.alibi
    team.attend(
        _C.Sequences(batch.token_bounds, positions.data_ptr(), origins.data_ptr(), origins.shape[1]),
        kv.native,
        [block, q.shape[1], window or 0],
        scale,
        _C.ScoreRule(
            0.0 if rule is None or rule.softcap is None else rule.softcap,
            0 if slopes is None else slopes.data_ptr(),
            1.0 if alibi is None else alibi.factor,
            alibi is not None and alibi.slopes.dtype == torch.bfloat16,
            0 if sinks is None else sinks.data_ptr(),
        ),
        [part.data_ptr() for part in (q, k, v, out)],
    )
    return out.to(queries_keys_values[0].dtype)


def _per_head(rule: ScoreRule | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Slopes and sinks, float32 ``[H]``."""
    if rule is None:
        return None, None
    slopes = None if rule.alibi is None else rule.alibi.slopes.float().contiguous()
    return slopes, None if rule.sinks is None else rule.sinks.detach().float().contiguous()
