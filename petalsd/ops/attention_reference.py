"""Paged attention in float32, one row after the other: what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.ragged import PagedKV


def reference_attention(
    q: torch.Tensor,
    kv: PagedKV,
    origins: torch.Tensor,
    rows: Sequence[tuple[int, int]],
    block: int,
    rule: AttentionRule,
) -> torch.Tensor:
    """Float32 ``[T, H, D]``: each row's new tokens attend to its context up to themselves.

    q        ``[T, H, D]``, the rows' new tokens one after the other
    origins  as in ``ops.decode_batch``
    rows     of each row its new tokens and what its last one attends to, itself included; a context of 0 is a
             padding row, whose tokens get zeros
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    start = 0
    for row, (num_tokens, context) in enumerate(rows):
        if context > 0:
            tokens = slice(start, start + num_tokens)
            k, v = _context(kv, origins[row], context, block)
            out[tokens] = _attend(q[tokens].float(), k, v, rule)
        start += num_tokens
    return out


def _context(
    kv: PagedKV, origins: torch.Tensor, context: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a row, ``[C, Hkv, D]`` float32."""
    keys = torch.arange(context, device=origins.device)
    pages = origins[keys // kv.page_tokens].long() + block
    k, v = kv.gather(pages * kv.page_tokens + keys % kv.page_tokens)
    return k.float(), v.float()


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
    """q ``[n, H, D]`` of the last n tokens of the context."""
    num_tokens, num_heads, _ = q.shape
    context = len(k)
    k, v = (states.repeat_interleave(num_heads // states.shape[1], dim=1) for states in (k, v))
    keys = torch.arange(context, device=q.device)
    queries = keys[context - num_tokens :]
    scores = torch.einsum("nhd,chd->hnc", q, k) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    distance = queries[:, None] - keys
    if rule.slopes is not None:
        scores = scores + rule.alibi_factor * _biases(rule, keys, distance)
    is_seen = distance >= 0
    if rule.window is not None:
        is_seen = is_seen & (distance < rule.window)
    scores = scores.masked_fill(~is_seen, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.view(-1, 1, 1).expand(-1, num_tokens, 1)
        return torch.einsum("hnc,chd->nhd", torch.cat((scores, sinks), -1).softmax(-1)[..., :-1], v)
    return torch.einsum("hnc,chd->nhd", scores.softmax(-1), v)


def _biases(rule: AttentionRule, keys: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """``[H, n, C]``, or ``[H, 1, C]`` up to what is the same for all keys of a query."""
    assert rule.slopes is not None
    if rule.rounds_biases:
        products = (rule.slopes.bfloat16()[:, None] * keys.bfloat16()).float()
        return (products - products[:, -1:])[:, None]
    return -rule.slopes[:, None, None] * distance
