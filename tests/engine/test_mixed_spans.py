"""Spans of which kernels compute a part, as on a GPU: those blocks are captured, the others are launched."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.engine.captures import Capturing
from petalsd.models.contract import Block
from petalsd.models.kernel_span import KernelSpan
from petalsd.models.paged_span import BlockByBlock, ChainedSpans, PagedSpan
from petalsd.types import BlockSpan
from tests.engine.kernel_rig import LIMITS, NUM_TOKENS, Counter, KernelRunners, generate, serving
from tests.engine.recorded_graphs import RecordedGraphs
from tests.engine.rig import CPU, TinyModel
from tests.models.kernel_blocks import NUM_SMS

PLAIN = 1
PROMPTS = {0: [7, 23, 91], 2: [42, 3, 9, 61]}
"""By the block at which the client cuts the model in two sessions."""


class MixedRunners(KernelRunners):
    """No kernel computes block ``PLAIN``."""

    def make_span(self, blocks: Mapping[int, Block]) -> PagedSpan:
        found = self.unpacked(blocks)
        runs = [[index for index in found if index < PLAIN], [index for index in found if index > PLAIN]]
        before, after = (KernelSpan({index: found[index] for index in run}, NUM_SMS) for run in runs)
        plain = BlockByBlock({PLAIN: found[PLAIN]})
        return ChainedSpans(
            [(before.span, before), (BlockSpan(PLAIN, PLAIN + 1), plain), (after.span, after)]
        )


@pytest.mark.nightly
async def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """Alone and at once, through all blocks and cut within a part that is captured whole."""
    model, counter, graphs = TinyModel(tmp_path, num_hidden_layers=4), Counter(), RecordedGraphs()
    reference: Any = model.reference
    expected = {
        cut: reference.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        for cut, prompt in PROMPTS.items()
    }
    runners = MixedRunners(CPU, 1, LIMITS, counter, Capturing(graphs))
    async with serving(model, counter, runners=runners) as engine:
        stats = engine.stats()
        assert stats.graphs == stats.graphs_wanted == 3 * (1 + 3)  # blocks 0, 2 and 3, and 2 and 3 at once
        assert await generate(engine, model, PROMPTS[0], 0) == expected[0]
        # The prompt through three parts, then two parts of three replayed.
        assert counter.runs == {True: 2 * (NUM_TOKENS - 1), False: 3 + (NUM_TOKENS - 1)}
        found = await asyncio.gather(*(generate(engine, model, PROMPTS[cut], cut) for cut in PROMPTS))
    assert found == list(expected.values())
