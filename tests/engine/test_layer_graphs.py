"""Captured steps of transformers' layers: nothing in them needs the host, and replays are as launched steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from petalsd.engine.step_memory import GraphLimits, StepMemory
from petalsd.models.gpu_products import GpuProducts
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.layer_span import LayerSpan
from petalsd.models.hf.norms import NormStandIn, find_norm
from petalsd.models.paged_span import CosSin
from petalsd.ops.launching import record_launches
from petalsd.ops.norm import Norm
from petalsd.ops.ragged import PagedKV
from tests.engine.graph_scene import LIMITS, PAGE_TOKENS, Scene
from tests.engine.recorded_graphs import RecordedGraph, Recorder, recording
from tests.models.kernel_blocks import NUM_SMS
from tests.models.test_layer_span import INTERPRETED, KERNEL_VARIANTS, Case
from tests.numeric import assert_close
from tests.tiers import nightly_except

META = torch.device("meta")
STARTS = [17, 3, 0]
BUCKET = 4
BY_HOST = ("phi3-longrope", "llama-longrope")
"""Steps of these need the host: angles by the length of a row."""
REPLAYED = [variant for variant in INTERPRETED if variant not in BY_HOST]


class MetaAngles:
    """Of a model, without memory."""

    dtype, device = torch.float32, META

    def __init__(self, angles: Any) -> None:
        self.is_length_dependent = angles.is_length_dependent
        self._tables = tuple(table.to(META) for table in angles.tables(1))

    def tables(self, end: int) -> CosSin:
        return self._tables


def meta_blocks(case: Case) -> dict[int, LayerBlock]:
    """As a GPU has them, without memory."""
    architecture, angles = case.ladder.architecture, MetaAngles(case.ladder.angles)
    names, products, blocks = architecture.layers.family.experts, GpuProducts(META, NUM_SMS), {}
    for index, block in case.blocks().items():
        layer = architecture.layers.empty_layer(index)
        if names is not None:
            products.replace_experts(layer, names)
        for name, module in block.layer.named_modules():
            if isinstance(module, NormStandIn):
                put_norm(layer, name, find_norm(module.whole), products)
        blocks[index] = LayerBlock(index, case.config, layer, angles, block.angles_part)  # type: ignore[arg-type]
    return blocks


def put_norm(layer: nn.Module, name: str, norm: Norm | None, products: GpuProducts) -> None:
    """What is known of a layer with values into one without."""
    assert norm is not None
    whole: Any = layer.get_submodule(name)
    kernel = products.norm(replace(norm, weight=whole.weight))
    assert kernel is not None
    layer.set_submodule(name, NormStandIn(whole, torch.float32, kernel))


@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
def test_no_step_needs_the_host(variant: str, tmp_path: Path) -> None:
    """Of no family: no value is read, no shape depends on one, nothing is made of the host's data."""
    case = Case(tmp_path, variant)
    span = LayerSpan(meta_blocks(case), NUM_SMS)
    assert span.is_capturable is (variant not in BY_HOST)
    if not span.is_capturable:
        return
    shape = (64, PAGE_TOKENS, case.config.num_kv_heads, case.config.head_dim)
    kv = PagedKV(*(torch.empty(shape, device=META) for _ in range(2)))
    memory = StepMemory(span, kv, GraphLimits(max_rows=BUCKET, max_runs=16, max_tokens=64))
    for mode in (record_launches(), Recorder([])):  # what is made at a first call is made before a capture
        with torch.inference_mode(), record_launches() as launches, mode:
            span.compute(span.span, memory.states, memory.rows(BUCKET), kv, memory.plans[BUCKET])
    assert len(launches) >= 2 * len(span.span)


@pytest.mark.parametrize(
    "variant", nightly_except(REPLAYED, "bloom-6-heads", "gemma3_text", "mixtral", "falcon-new")
)
def test_a_replay_equals_the_step(variant: str, tmp_path: Path) -> None:
    """With NaN in pages that nobody wrote and in the padding row."""
    case = Case(tmp_path, variant)
    span = LayerSpan(case.kernel_blocks(), NUM_SMS)
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
