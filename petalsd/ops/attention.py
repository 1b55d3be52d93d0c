"""Causal attention with grouped KV heads: over the pages of a ragged batch, or dense and without a cache."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from petalsd.ops.attention_plan import DecodeGroup, PrefillRow, plan_attention, visible_keys
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.ops.score_rule import ScoreRule, rule_attention


def paged_attention(
    q: torch.Tensor,
    kv: PagedKV,
    batch: RaggedBatch,
    block: int,
    scale: float,
    window: int | None,
    rule: ScoreRule | None = None,
) -> torch.Tensor:
    """Each new token attends to its row's context, itself included, whose K and V are already in the pages.

    q       ``[T, H, D]`` rotated, in the slab's dtype; H is a multiple of the slab's Hkv, head h reads KV head
            ``h // (H / Hkv)``
    block   index of the block, which selects the page within each run
    scale   factor on the scores, ``1/sqrt(D)`` for most families
    window  a token sees itself and the ``window - 1`` before it; None: everything before it
    rule    what else is done to the scores; None: nothing

    Returns ``[T, H, D]``. A row's result depends on nothing that other rows wrote, be it NaN.
    """
    plan = plan_attention(batch, kv.page_tokens, window)
    first_slot = block * kv.page_tokens
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in plan.decode:
        if group.tokens is None:
            return _attend_decode(q, kv, group, first_slot, scale, rule)
        picked = q.index_select(0, group.tokens)
        out.index_copy_(0, group.tokens, _attend_decode(picked, kv, group, first_slot, scale, rule))
    for row in plan.prefill:
        out[row.start : row.end] = _attend_prefill(q[row.start : row.end], kv, row, first_slot, scale, rule)
    return out


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    rule: ScoreRule | None = None,
) -> torch.Tensor:
    """Causal attention without a cache; differentiable.

    q     ``[B, H, n, D]``, of the last n tokens of whole sequences of m
    k, v  ``[B, Hkv, m, D]``, from position 0 on

    scale, window and rule as in ``paged_attention``. Returns ``[B, H, n, D]``.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if rule is None and num_queries == num_keys and (window is None or window >= num_keys):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    positions = torch.arange(num_keys, device=q.device)
    visible = visible_keys(positions[num_keys - num_queries :], positions, window)
    if rule is not None:
        return rule_attention(q, k, v, visible, positions[None], scale, rule)
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)


def _attend_decode(
    q: torch.Tensor, kv: PagedKV, group: DecodeGroup, first_slot: int, scale: float, rule: ScoreRule | None
) -> torch.Tensor:
    """q ``[R, H, D]`` in the group's row order. The query heads of a KV head stand where a sequence would."""
    num_rows, num_heads, head_dim = q.shape
    k, v = kv.gather(group.slots + first_slot)
    num_kv_heads = k.shape[1]
    context = (num_rows, -1, num_kv_heads, head_dim)
    k, v = k.view(context).transpose(1, 2), v.view(context).transpose(1, 2)
    if rule is not None:
        return rule_attention(q.unsqueeze(2), k, v, group.is_valid, group.keys, scale, rule).squeeze(2)
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if grouped.shape[2] == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # On a CPU torch takes three times as long for one query in bfloat16 as with the conversions.
        grouped, k, v = grouped.float(), k.float(), v.float()
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=group.is_valid, scale=scale)
    return out.to(q.dtype).reshape(num_rows, num_heads, head_dim)


def _attend_prefill(
    q: torch.Tensor, kv: PagedKV, row: PrefillRow, first_slot: int, scale: float, rule: ScoreRule | None
) -> torch.Tensor:
    """q ``[n, H, D]`` of one row."""
    k, v = kv.gather(row.slots + first_slot)
    q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in (q, k, v))
    if rule is not None:
        visible = (
            visible_keys(row.keys[-q.shape[2] :], row.keys, None) if row.visible is None else row.visible
        )
        out = rule_attention(q, k, v, visible, row.keys[None], scale, rule)
    else:
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=row.visible, is_causal=row.visible is None, scale=scale, enable_gqa=True
        )
    return out.squeeze(0).transpose(0, 1)
