"""Capped scores, linear biases and sinks, over pages and dense, against softmax per token; and slopes by head."""

from __future__ import annotations

import math

import pytest
import torch

from petalsd.ops import score_rule
from petalsd.ops.attention import dense_attention, paged_attention
from petalsd.ops.kv import write_kv
from petalsd.ops.score_rule import Alibi, ScoreRule
from tests.numeric import assert_close
from tests.paged_rows import PagedRows

HEADS, KV_HEADS, HEAD_DIM, BLOCKS = 6, 2, 16, 3
SCALE = HEAD_DIM**-0.5
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.06, 0.03, 0.01])
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0, -9.0])

RULES = {
    "softcap": ScoreRule(softcap=0.7),
    "alibi": ScoreRule(alibi=Alibi(SLOPES, 0.5)),
    "sinks": ScoreRule(sinks=SINKS),
    "softcap and alibi": ScoreRule(softcap=2.0, alibi=Alibi(SLOPES)),
    "softcap and sinks": ScoreRule(softcap=2.0, sinks=SINKS),
}


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, rule: ScoreRule
) -> torch.Tensor:
    """Attention of ``[n, heads, D]`` in float64, one token and head at a time."""
    out = torch.empty_like(q, dtype=torch.float64)
    for i in range(len(q)):
        first = 0 if window is None else max(0, i + 1 - window)
        seen = torch.arange(first, i + 1)
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            scores = k[seen, kv_head].double() @ q[i, head].double() * SCALE
            if rule.softcap is not None:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            if rule.alibi is not None:
                scores = scores - rule.alibi.factor * rule.alibi.slopes[head].double() * (i - seen)
            sink = [] if rule.sinks is None else [rule.sinks[head].double().view(1)]
            weights = torch.cat([scores, *sink]).softmax(0)[: len(seen)]
            out[i, head] = weights @ v[seen, kv_head].double()
    return out


def random_qkv(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (3 * torch.randn(length, count, HEAD_DIM, generator=generator) for count in heads)
    return q, k, v


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", RULES)
def test_paged_equals_naive(name: str, window: int | None) -> None:
    """Prefills, chunks and decodes of rows of different lengths; what nobody wrote is NaN and stays out."""
    rows = PagedRows(BLOCKS, KV_HEADS, HEAD_DIM, page_tokens=4)
    tensors = {rows.add_row(): random_qkv(length) for length in (30, 30, 12)}
    expected = {row: naive(*qkv, window, RULES[name]) for row, qkv in tensors.items()}
    for counts in ({0: 7}, {2: 3, 0: 1, 1: 13}, {0: 1, 1: 1, 2: 1}, {1: 9, 0: 5, 2: 1}, {2: 1, 1: 1}):
        starts = {row: rows.lengths[row] for row in counts}
        batch = rows.extend(counts)
        q, k, v = (
            torch.cat([tensors[row][part][starts[row] : rows.lengths[row]] for row in counts])
            for part in range(3)
        )
        write_kv(k, v, rows.kv, batch, 1)
        out = paged_attention(q, rows.kv, batch, 1, SCALE, window, RULES[name])
        for row, states in zip(counts, out.split(list(counts.values())), strict=True):
            wanted = expected[row][starts[row] : rows.lengths[row]]
            assert_close(states, wanted, 1e-5, 1e-5, f"row {row} at {starts[row]}")


@pytest.mark.parametrize("max_scores", [1, 1 << 24], ids=["query by query", "at once"])
@pytest.mark.parametrize("name", RULES)
def test_dense_equals_naive(name: str, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queries are computed at once."""
    monkeypatch.setattr(score_rule, "_MAX_SCORES", max_scores)
    q, k, v = random_qkv(20)
    out = dense_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), SCALE, 7, RULES[name])
    assert_close(out[0].transpose(0, 1), naive(q, k, v, 7, RULES[name]), 1e-5, 1e-5, name)


def test_biases_are_rounded_to_the_dtype_of_the_slopes() -> None:
    """As a model was trained that held its biases in bfloat16; far from the start that matters."""
    slopes, keys = torch.tensor([2.0 ** (-1 / 3)], dtype=torch.bfloat16), torch.arange(1000)[None]
    biases = Alibi(slopes).biases(keys)[0, 0]
    products = slopes * keys[0]
    assert products.dtype is torch.bfloat16
    assert torch.equal(biases, products.float() - products[-1].float())
    assert math.isclose(float(biases[-1]), 0.0)
