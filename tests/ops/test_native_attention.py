"""Attention of one block by the CPU's kernels, in every tier: what torch makes of copies of the same pages."""

from __future__ import annotations

import pytest
import torch

from petalsd import _C
from petalsd.errors import KVPoolError
from petalsd.ops.attention import paged_attention
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.native_attention import native_attention
from petalsd.ops.ragged import RaggedBatch
from petalsd.ops.score_rule import Alibi, ScoreRule
from tests.models.test_native_span import TIERS, has_tier
from tests.numeric import assert_close
from tests.ops.test_score_rule import SINKS, SLOPES
from tests.paged_rows import PagedRows

HEADS, KV_HEADS, HEAD_DIM, BLOCKS, BLOCK, PAGE_TOKENS = 6, 2, 20, 3, 1, 16
SCALE = 0.3
STEPS = [{0: 70, 1: 3, 2: 150}, {0: 1, 1: 1, 2: 1}, {1: 20, 0: 1}, {0: 1, 1: 1, 2: 1}]
LONG = [{0: 2600}, {0: 1}]
"""In parts of 1024, which threads share."""

RULES = {
    "none": None,
    "softcap": ScoreRule(softcap=2.0),
    "alibi": ScoreRule(alibi=Alibi(SLOPES, 0.5)),
    "rounded alibi": ScoreRule(alibi=Alibi(SLOPES.bfloat16(), 0.3)),
    "sinks": ScoreRule(sinks=SINKS),
    "softcap and alibi": ScoreRule(softcap=2.0, alibi=Alibi(SLOPES)),
    "softcap and sinks": ScoreRule(softcap=2.0, sinks=SINKS),
}


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    if not has_tier(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


class Steps:
    """Some steps of random states, over pages whose empty places hold garbage."""

    def __init__(
        self,
        steps: list[dict[int, int]],
        window: int | None = None,
        rule: ScoreRule | None = None,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
    ) -> None:
        self.steps, self.window, self.rule, self.dtype, self.stored = steps, window, rule, dtype, stored

    def native(self, team: _C.LayerTeam) -> torch.Tensor:
        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: HeadMajorKV, batch: RaggedBatch
        ) -> torch.Tensor:
            place = BLOCK, self.window
            return native_attention(team, (q, k, v), kv, batch, place, SCALE, self.rule)

        return self._run(attend)

    def by_torch(self) -> torch.Tensor:
        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: HeadMajorKV, batch: RaggedBatch
        ) -> torch.Tensor:
            slots = (batch.write_origins + BLOCK) * PAGE_TOKENS + batch.write_offsets
            kv.write(slots, k, v)
            return paged_attention(q, kv, batch, BLOCK, SCALE, self.window, self.rule)

        return self._run(attend)

    def _run(self, attend: object) -> torch.Tensor:
        generator, answers = torch.Generator().manual_seed(2), []
        rows = PagedRows(BLOCKS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, 200, self.dtype).in_head_major(self.stored)
        for _ in self.steps[0]:
            rows.add_row()
        for new in self.steps:
            batch = rows.extend(new)
            drawn = (
                torch.randn(batch.num_tokens, heads, HEAD_DIM, generator=generator).to(self.dtype)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            answers.append(attend(*drawn, rows.kv, batch))  # type: ignore[operator]
        return torch.cat(answers)


@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("rule", RULES)
def test_float32_equals_torch(rule: str, window: int | None, tier: str) -> None:
    """Prefills and decodes of several rows; a page, a tile and a window end in the middle of them."""
    steps = Steps(STEPS, window, RULES[rule])
    assert_close(steps.native(_C.LayerTeam(1, tier)), steps.by_torch(), 2e-5, 2e-5, f"{rule} in {window}")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_bfloat16_and_int8_are_as_near_as_torch_is(stored: torch.dtype, tier: str) -> None:
    """To the same in float32."""
    steps = Steps(STEPS, 40, RULES["softcap and alibi"], torch.bfloat16, stored)
    actual, rounded = steps.native(_C.LayerTeam(1, tier)), steps.by_torch()
    assert actual.dtype == torch.bfloat16
    assert (actual - rounded).float().norm() < 0.02 * rounded.float().norm()


@pytest.mark.parametrize("rule", ["none", "softcap and sinks", "alibi"])
def test_threads_change_no_bit(rule: str, tier: str) -> None:
    """Of a context in parts, nor of many rows that are taken 128 at a time."""
    steps = Steps(LONG, None, RULES[rule])
    alone = steps.native(_C.LayerTeam(1, tier))
    assert torch.equal(steps.native(_C.LayerTeam(3, tier)), alone)
    assert_close(alone[-1:], steps.by_torch()[-1:], 2e-5, 2e-5, rule)


def test_what_does_not_fit_is_refused() -> None:
    """With the number that is wrong."""
    rows = PagedRows(BLOCKS, KV_HEADS, HEAD_DIM, PAGE_TOKENS).in_head_major()
    rows.add_row()
    batch = rows.extend({0: 2})
    states = [torch.zeros(2, heads, HEAD_DIM) for heads in (5, KV_HEADS, KV_HEADS)]
    assert isinstance(rows.kv, HeadMajorKV)
    team = _C.LayerTeam(1, "auto")
    with pytest.raises(KVPoolError, match="5 heads over 2 KV heads"):
        native_attention(team, (states[0], states[1], states[2]), rows.kv, batch, (BLOCK, None), SCALE)
    batch.positions = batch.positions.int()
    with pytest.raises(ValueError, match="int64"):
        native_attention(team, (states[1], states[1], states[2]), rows.kv, batch, (BLOCK, None), SCALE)
