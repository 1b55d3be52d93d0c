"""A whole model served as on a GPU, on the CPU: kernels in the interpreter, staged batches, graphs by a double."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.engine.captures import Capturing
from petalsd.engine.engine import Engine
from petalsd.engine.observer import NullObserver
from petalsd.engine.step import Step
from petalsd.kvcache.pool import KVPool
from petalsd.models.ladder import Rung
from petalsd.types import BlockSpan
from tests.engine.kernel_rig import (
    LIMITS,
    NUM_TOKENS,
    Counter,
    KernelRunners,
    LayerRunners,
    StagedRunners,
    generate,
    geometry_of,
    serving,
)
from tests.engine.recorded_graphs import RecordedGraphs
from tests.engine.rig import CPU, TinyModel, feed, opened, states
from tests.numeric import assert_close
from tests.tiers import nightly_except
from tests.tiny_models import LAYER_VARIANTS

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 32},  # with norms of q and k
    "mistral": {},  # with a window of 12 tokens
}
PROMPTS = [[7, 23, 91, 4, 55, 120, 8, 17, 33, 2, 64, 5, 99, 31, 76, 200, 12], [42, 3], [150, 9, 61, 18, 77]]


@pytest.mark.parametrize("family", nightly_except(MODELS, "llama"))
async def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Prompts of other lengths through the whole span and through parts of it, at once, in chunks and batches."""
    model = TinyModel(tmp_path, family, num_hidden_layers=2, **MODELS[family])
    reference: Any = model.reference
    expected = [
        reference.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[
            0, len(prompt) :
        ]
        for prompt in PROMPTS
    ]
    graphs, counter = RecordedGraphs() if family == "llama" else None, Counter()
    async with serving(model, counter, graphs) as engine:
        found = await asyncio.gather(
            *(generate(engine, model, prompt, cut) for prompt, cut in zip(PROMPTS, (0, 1, 0), strict=True))
        )
    assert found == [tokens.tolist() for tokens in expected]
    if graphs is not None:
        assert counter.runs[True] >= NUM_TOKENS - 1 and counter.runs[False] >= 1


async def test_rows_that_were_reordered_and_rolled_back_go_on_as_they_should(tmp_path: Path) -> None:
    """Beams copy their last page, and a step that is sent again replaces what it wrote."""
    model = TinyModel(tmp_path, num_hidden_layers=1)
    hidden, other = states(2, 10), states(2, 3, seed=1)
    counter = Counter()
    async with serving(model, counter, RecordedGraphs()) as engine, opened(engine, batch=2) as session:
        await feed(session, hidden, [9, 1])
        await session.step(Step(other[:, :1], 10, hypo_ids=(1, 1)))
        await session.step(Step(other[:, :1], 8))
        actual = torch.cat(
            [await session.step(Step(other[:, n : n + 1], 8 + n, hypo_ids=(1, 0))) for n in range(3)], dim=1
        )
    # Both rows are old row 1; after each of the last two steps they have changed places.
    rows = torch.arange(2)
    sequences = torch.cat(
        (hidden[[1, 1], :8], other[rows, :1], other[1 - rows, 1:2], other[rows, 2:3]), dim=1
    )
    expected = model.expected(sequences).detach()[:, 8:]
    expected[:, 1] = expected[:, 1].flip(0).clone()
    assert_close(actual, expected, 1e-4, 1e-4, "steps after reorders and a rollback")
    assert counter.runs[True] == 6


async def test_prompts_are_added_before_the_blocks_compute(tmp_path: Path) -> None:
    """Block by block then, in prefill and in a captured step."""
    model, span = TinyModel(tmp_path, num_hidden_layers=2), BlockSpan(0, 2)
    hidden, prompts = states(1, 4), torch.randn(2, 2, 1, 1, 64, generator=torch.Generator().manual_seed(9))
    counter = Counter()
    async with serving(model, counter, RecordedGraphs()) as engine, opened(engine) as session:
        first = await session.step(Step(hidden[:, :3], 0, prompts=prompts[0]))
        second = await session.step(Step(hidden[:, 3:], 3, prompts=prompts[1]))
    expected = hidden.clone()
    for block in span:
        expected[:, :1] += prompts[0, block]
        expected[:, 3:] += prompts[1, block]
        expected = model.expected(expected, BlockSpan(block, block + 1)).detach()
    assert_close(torch.cat((first, second), dim=1), expected, 1e-4, 1e-4, "states with prompts")
    assert counter.runs == {True: len(span), False: len(span)}


@pytest.mark.parametrize("family", ["opt", "bloom"])
async def test_layers_of_transformers_take_staged_batches(family: str, tmp_path: Path) -> None:
    """Integers of 32 bits are as good to them."""
    model, hidden = TinyModel(tmp_path, family, num_hidden_layers=2), states(2, 9)
    runners = StagedRunners(CPU, 1, LIMITS, NullObserver())
    async with serving(model, NullObserver(), runners=runners) as engine, opened(engine, batch=2) as session:
        actual = await feed(session, hidden, [7, 1, 1])
    assert_close(actual, model.expected(hidden).detach(), 1e-4, 1e-4, family)


@pytest.mark.parametrize(("family", "num_layers"), [("bloom", 1), ("gemma2", 2)])
async def test_layers_of_transformers_are_captured_too(family: str, num_layers: int, tmp_path: Path) -> None:
    """A prefill in chunks, then steps of two rows that change places, in replays."""
    settings = {**LAYER_VARIANTS[family][1], "num_hidden_layers": num_layers}
    model, hidden, counter = TinyModel(tmp_path, family, Rung.PLAIN, **settings), states(2, 13), Counter()
    runners = LayerRunners(CPU, 1, LIMITS, counter, Capturing(RecordedGraphs()))
    async with serving(model, counter, runners=runners) as engine, opened(engine, batch=2) as session:
        assert engine.stats().graphs == engine.stats().graphs_wanted > 0
        actual = [await feed(session, hidden[:, :12], [11, 1])]
        actual.append(await session.step(Step(hidden[:, 12:], 12, hypo_ids=(1, 0))))
    history = torch.cat((hidden[[1, 0], :12], hidden[:, 12:]), dim=1)
    assert_close(actual[0], model.expected(hidden[:, :12]).detach(), 1e-4, 1e-4, family)
    assert_close(actual[1], model.expected(history).detach()[:, 12:], 1e-4, 1e-4, f"{family}, reordered")
    assert counter.runs[True] == 2


async def test_graph_memory_is_known_before_there_are_pages(tmp_path: Path) -> None:
    """A trial over a pool of one page takes what the graphs of the whole one take; it leaves nothing behind."""
    model = TinyModel(tmp_path, num_hidden_layers=1)
    async with serving(model, Counter(), RecordedGraphs()) as engine:
        captured = engine.stats().graph_bytes
    capturing = Capturing(RecordedGraphs())
    engine = Engine(LIMITS, CPU, 1, None, KernelRunners(CPU, 1, LIMITS, NullObserver(), capturing))
    await engine.start()
    try:
        pool = KVPool(geometry_of(model), 2, torch.float32, CPU)
        pool.allocate()
        assert await engine.measure_graphs(model.blocks, pool) == captured > 0
        assert engine.stats().graphs_wanted == 0
    finally:
        await engine.stop(deadline_s=10)


async def test_a_failed_capture_is_told_and_steps_are_computed(tmp_path: Path) -> None:
    model = TinyModel(tmp_path, num_hidden_layers=1)
    hidden = states(1, 3)
    async with serving(model, Counter(), RecordedGraphs(fail_at=0)) as engine:
        stats = engine.stats()
        assert (stats.graphs, stats.graphs_wanted, stats.graph_bytes) == (0, 3, 0)
        assert stats.graphs_failure == "RuntimeError: operation not permitted when stream is capturing"
        async with opened(engine) as session:
            actual = await feed(session, hidden, [2, 1])
    assert_close(actual, model.expected(hidden).detach(), 1e-4, 1e-4, "without graphs")
