"""Attention over pages at the shapes of a model: decode by rows and contexts, prefill."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.cards import ATTENTION_CONTEXT, ATTENTION_ROWS, Card, Shape
from benchmarks.gpu.case import Case, Site, relative_error
from benchmarks.gpu.pages import Rows
from benchmarks.gpu.rivals import installed
from benchmarks.gpu.roofline import Step, attention_launches
from benchmarks.report import TORCH
from petalsd.ops.attention_reference import reference_attention
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import DecodePlan, decode_attention
from petalsd.ops.prefill_attention import prefill_attention

DECODES = (
    (1, ATTENTION_CONTEXT),
    *((rows, ATTENTION_CONTEXT) for rows in ATTENTION_ROWS),
    (1, 8 * ATTENTION_CONTEXT),
)
PREFILLS = ((1, 2048, 2048), (4, 512, 4096))  # rows, new tokens and context of each
_CHECKED_ROWS = 2


def cases(site: Site, shape: Shape) -> Iterator[Case]:
    for num_rows, context in DECODES:
        yield decode(site, shape, num_rows, context // site.scale)
    for num_rows, new_tokens, context in PREFILLS:
        yield prefill(site, shape, num_rows, new_tokens // site.scale, context // site.scale)


def decode(site: Site, shape: Shape, num_rows: int, context: int) -> Case:
    """One new token of each row."""
    rows = Rows.draw(site, shape, [context] * num_rows)
    q, rule = site.randn(num_rows, shape.num_heads, shape.head_dim), AttentionRule(shape.head_dim**-0.5)
    plan = DecodePlan.create(num_rows, shape.num_heads, rows.kv, site.num_sms, context)
    out, batch = torch.empty_like(q), rows.decode()
    k, v = rows.dense()
    rivals, skipped = installed(q, rows, rule.scale)

    def by_torch() -> torch.Tensor:
        return scaled_dot_product_attention(q[:, :, None], k, v, scale=rule.scale, enable_gqa=True)

    def errors() -> list[float]:
        checked = min(num_rows, _CHECKED_ROWS)
        expected = reference_attention(q[:checked], rows.kv, rows.origins, [(1, context)] * checked, 0, rule)
        return [relative_error(out[:checked], expected), relative_error(out, by_torch()[:, :, 0])]

    card = Card("this", 1, 1, site.num_sms)
    launches = attention_launches(shape, Step(num_rows, context), card)
    return Case(
        "decode_attention",
        {"rows": num_rows, "context": context},
        lambda: decode_attention(q, rows.kv, batch, 0, rule, plan, out),
        errors,
        round(sum(launch.nbytes for launch in launches)),
        rivals={TORCH: by_torch, **rivals},
        skipped=skipped,
    )


def prefill(site: Site, shape: Shape, num_rows: int, new_tokens: int, context: int) -> Case:
    """New tokens of each row at the end of its context."""
    rows = Rows.draw(site, shape, [context] * num_rows)
    q = site.randn(num_rows * new_tokens, shape.num_heads, shape.head_dim)
    rule, out, batch = AttentionRule(shape.head_dim**-0.5), torch.empty_like(q), rows.prefill(new_tokens)
    k, v = rows.dense()
    queries = q.view(num_rows, new_tokens, shape.num_heads, shape.head_dim).transpose(1, 2).contiguous()
    # torch's own causal rule begins at the first key; with a context before the new tokens it needs a mask.
    mask = torch.ones(new_tokens, context, dtype=torch.bool, device=site.device).tril(context - new_tokens)
    is_causal = new_tokens == context

    def by_torch() -> torch.Tensor:
        return scaled_dot_product_attention(
            queries, k, v, None if is_causal else mask, is_causal=is_causal, scale=rule.scale, enable_gqa=True
        )

    def errors() -> list[float]:
        expected = reference_attention(
            q[:new_tokens], rows.kv, rows.origins, [(new_tokens, context)], 0, rule
        )
        dense = by_torch().transpose(1, 2).flatten(0, 1)
        return [relative_error(out[:new_tokens], expected), relative_error(out, dense)]

    seen = new_tokens * (context - new_tokens) + new_tokens * (new_tokens + 1) // 2
    return Case(
        "prefill_attention",
        {"rows": num_rows, "tokens": new_tokens, "context": context},
        lambda: prefill_attention(q, rows.kv, batch, 0, rule, out),
        errors,
        num_rows * context * shape.kv_token_bytes + 2 * q.nbytes,
        flops=4 * num_rows * seen * shape.num_heads * shape.head_dim,
        rivals={TORCH: by_torch},
    )
