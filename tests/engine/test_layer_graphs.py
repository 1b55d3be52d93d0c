"""Captured steps of transformers' layers, in Triton's interpreter: as launched ones, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petalsd.engine.step_memory import StepMemory
from petalsd.models.hf.layer_span import LayerSpan
from tests.engine.graph_scene import LIMITS, Scene
from tests.engine.recorded_graphs import RecordedGraph, recording
from tests.models.kernel_blocks import NUM_SMS
from tests.models.test_layer_span import KERNEL_VARIANTS, Case
from tests.numeric import assert_close

STARTS = [17, 3, 0]
BUCKET = 4


@pytest.mark.parametrize("variant", [variant for variant in KERNEL_VARIANTS if "longrope" not in variant])
def test_a_replay_equals_the_step(variant: str, tmp_path: Path) -> None:
    """With NaN in pages that nobody wrote and in the padding row; and no operation needs the host."""
    case = Case(tmp_path, variant)
    span = LayerSpan(case.kernel_blocks(), NUM_SMS)
    assert span.is_capturable
    scene = Scene(span, STARTS)
    expected = scene.step(span)  # and what is made at a first call is made
    memory = StepMemory(span, scene.pool.kv, LIMITS)
    memory.pad(BUCKET)
    with torch.inference_mode(), recording() as tape:
        span.compute(
            span.span, memory.states.first(BUCKET), memory.rows(BUCKET), scene.pool.kv, memory.plans[BUCKET]
        )
    rows = scene.batch().kernel_rows
    assert rows is not None and rows.packed is not None
    with torch.inference_mode():
        memory.states.hidden.fill_(torch.nan)  # type: ignore[attr-defined]
        memory.integers[: len(rows.packed)].copy_(rows.packed)
        memory.states.enter(scene.staging.bring([item.hidden for item in scene.items]))
        RecordedGraph(tape).replay()
    assert_close(memory.states.leave(len(STARTS)), expected, 1e-4, 1e-4, variant)


def test_steps_that_need_the_host_are_not_captured(tmp_path: Path) -> None:
    """Angles by the length of a row, and tokens that are sent to experts from the host."""
    dense, long, sparse = (Case(tmp_path / name, name) for name in ("phi", "llama-longrope", "mixtral"))
    assert LayerSpan(dense.kernel_blocks(), NUM_SMS).is_capturable
    assert not LayerSpan(long.kernel_blocks(), NUM_SMS).is_capturable
    assert not LayerSpan(sparse.blocks(), NUM_SMS).is_capturable
