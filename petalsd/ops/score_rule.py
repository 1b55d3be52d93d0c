"""Attention whose scores are more than scaled dot products: capped, biased by distance, or with a sink.

What the fast attention of torch cannot express. Families that need none of this never come here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MAX_SCORES = 1 << 24
"""Scores that are held at once, in float32; longer runs of queries are cut."""


@dataclass(frozen=True, slots=True)
class Alibi:
    """Attention with linear biases, Press et al., 2021: ``factor * slope * position`` is added to a key's score.

    slopes  ``[H]``; the product with the position is rounded to their dtype, as the model was trained with
    factor  what the family scales the biases with
    """

    slopes: torch.Tensor
    factor: float = 1.0

    def biases(self, keys: torch.Tensor) -> torch.Tensor:
        """``[B, H, C]`` float32 for positions ``[B, C]``, less the last key's, which softmax does not see."""
        products = (self.slopes[:, None] * keys[:, None, :]).float()
        return self.factor * (products - products[..., -1:])


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """What happens to the scores between the dot product and the softmax, in this order.

    softcap  scores become ``softcap * tanh(scores / softcap)``
    alibi    biases by position
    sinks    ``[H]``: each query also sees a key of this score, which has no value; not beside biases, which are
             counted from a key that differs between queries
    """

    softcap: float | None = None
    alibi: Alibi | None = None
    sinks: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.alibi is not None and self.sinks is not None:
            raise ValueError("linear biases and sinks do not go together")


def rule_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    keys: torch.Tensor,
    scale: float,
    rule: ScoreRule,
) -> torch.Tensor:
    """Attention by ``rule``, the softmax in float32; differentiable.

    q        ``[B, H, n, D]``
    k, v     ``[B, Hkv, C, D]``
    visible  bool, broadcast to ``[B, H, n, C]``; None: every query sees every key
    keys     ``[B, C]`` int64, the keys' positions, ascending

    Returns ``[B, H, n, D]``.
    """
    batch, num_heads, num_queries, _ = q.shape
    step = max(1, _MAX_SCORES // (batch * num_heads * k.shape[2]))
    parts = []
    for start in range(0, num_queries, step):
        queries = slice(start, start + step)
        seen = visible if visible is None or visible.shape[-2] == 1 else visible[..., queries, :]
        parts.append(_attend(q[:, :, queries], k, v, seen, keys, scale, rule))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    keys: torch.Tensor,
    scale: float,
    rule: ScoreRule,
) -> torch.Tensor:
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.reshape(batch, num_kv_heads, -1, head_dim)  # the query heads of a KV head one after the other
    scores = (grouped @ k.transpose(-1, -2)).view(batch, num_heads, num_queries, -1).float() * scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.alibi is not None:
        scores = scores + rule.alibi.biases(keys).unsqueeze(2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, -1, 1, 1).expand(batch, num_heads, num_queries, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)
    if rule.sinks is not None:
        weights = weights[..., :-1]
    weights = weights.to(v.dtype).view(batch, num_kv_heads, -1, k.shape[2])
    return (weights @ v).view(batch, num_heads, num_queries, head_dim)
