"""The reference that kernels are held to, against transformers' attention and the paged attention of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_biases
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_biases
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention

from petalsd.models.hf.linear_biases import bloom_rule, falcon_rule
from petalsd.ops.attention import paged_attention
from petalsd.ops.attention_reference import reference_attention
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.score_rule import Alibi, ScoreRule
from tests.kernels.attention_rows import BLOCK, F32, AttentionCase
from tests.numeric import assert_close

HEADS, KV_HEADS, HEAD_DIM, CONTEXT, NEW = 8, 2, 16, 40, 7
SCALE = HEAD_DIM**-0.5


@pytest.fixture(autouse=True)
def _on_the_cpu(_device: None) -> Iterator[None]:
    """No kernels here."""
    with torch.device("cpu"):
        yield


def one_row(rule: AttentionRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference's result ``[NEW, H, D]`` for one row, and q, k, v as transformers wants them."""
    rows = AttentionCase(HEADS // KV_HEADS, KV_HEADS, HEAD_DIM, 16, 1, F32).rows()
    rows.append({0: CONTEXT - NEW})
    q, batch = rows.append({0: NEW})
    kv = rows.rows.kv
    out = reference_attention(q, kv, batch.origins, [(NEW, CONTEXT)], BLOCK, rule)
    places = torch.arange(CONTEXT)
    slots = (batch.origins[0, places // 16].long() + BLOCK) * 16 + places % 16
    k, v = kv.gather(slots)
    return out, *(states.transpose(0, 1)[None] for states in (q, k, v))


def mask(window: int | None = None) -> torch.Tensor:
    """``[1, 1, NEW, CONTEXT]``, 0 where a query sees a key."""
    distance = torch.arange(CONTEXT - NEW, CONTEXT)[:, None] - torch.arange(CONTEXT)
    hidden = (distance < 0) | (distance >= (window or CONTEXT))
    return torch.zeros(distance.shape).masked_fill(hidden, -torch.inf)[None, None]


def module(**more: object) -> SimpleNamespace:
    return SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=False, **more)


@pytest.mark.parametrize("window", [None, 9])
def test_it_is_the_attention_of_llama(window: int | None) -> None:
    """Grouped heads, a causal mask and a window."""
    out, q, k, v = one_row(AttentionRule(SCALE, window))
    expected, _ = llama_attention(module(), q, k, v, mask(window), SCALE)
    assert_close(out, expected[0], 1e-5, 1e-5, "llama")


def test_it_is_the_attention_of_gemma_2() -> None:
    """Capped scores, and a window."""
    out, q, k, v = one_row(AttentionRule(SCALE, 12, softcap=0.4))
    expected, _ = gemma_attention(module(), q, k, v, mask(12), scaling=SCALE, softcap=0.4)
    assert_close(out, expected[0], 1e-5, 1e-5, "gemma 2")


def test_it_is_the_attention_of_gpt_oss() -> None:
    """Sinks take their share of the weights and give nothing."""
    sinks = torch.randn(HEADS) * 3
    out, q, k, v = one_row(AttentionRule(SCALE, 12, sinks=sinks))
    expected, _ = gpt_oss_attention(module(sinks=sinks), q, k, v, mask(12), SCALE)
    assert_close(out, expected[0], 1e-5, 1e-5, "gpt-oss")


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_its_biases_are_those_of_transformers(family: str) -> None:
    """BLOOM's by distance, and Falcon's of rounded products, which are scaled as the scores are."""
    cpu = torch.device("cpu")
    rule = bloom_rule(HEADS, cpu) if family == "bloom" else falcon_rule(HEADS, SCALE, cpu)
    out, q, k, v = one_row(AttentionRule.of(SCALE, None, rule))
    build, factor = (bloom_biases, 1.0) if family == "bloom" else (falcon_biases, SCALE)
    biases = build(torch.ones(1, CONTEXT, dtype=torch.long), HEADS, F32).view(1, HEADS, 1, CONTEXT)
    expected, _ = llama_attention(module(), q, k, v, mask() + factor * biases, SCALE)
    assert_close(out, expected[0], 1e-4, 1e-5, family)


RULES = {
    "plain": None,
    "soft-cap": ScoreRule(softcap=0.7),
    "sinks": ScoreRule(sinks=torch.linspace(-3, 3, HEADS)),
    "biases": ScoreRule(alibi=Alibi(torch.linspace(0.01, 0.5, HEADS), 0.5)),
    "rounded biases": ScoreRule(alibi=Alibi(torch.linspace(0.01, 0.5, HEADS).bfloat16(), 0.5)),
}


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", RULES)
def test_it_is_the_paged_attention_of_the_cpu(name: str, window: int | None) -> None:
    """Ragged rows of the same pages, by the same rule."""
    rows = AttentionCase(HEADS // KV_HEADS, KV_HEADS, HEAD_DIM, 16, 1, F32).rows()
    rows.append({0: 30, 1: 3})
    q, batch = rows.append({0: 1, 1: 20, 2: 40})
    expected = paged_attention(q, rows.rows.kv, batch, BLOCK, SCALE, window, RULES[name])
    lengths = list(zip((1, 20, 40), batch.context_lens, strict=True))
    rule = AttentionRule.of(SCALE, window, RULES[name])
    out = reference_attention(q, rows.rows.kv, batch.origins, lengths, BLOCK, rule)
    assert_close(out, expected, 1e-5, 1e-5, name)
