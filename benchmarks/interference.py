"""What a client that decodes feels of others: its steps alone, beside a long prefill, beside passes; in process.

    python -m benchmarks.interference [--tokens 2048] [--rounds 5] [--threads 2]

Client A decodes through all blocks of the demo model, at the same position every time. In each round client
B's work runs without A, A decodes without B, and then both go on together until B is answered. A sample is one
round's: the median or the 95th percentile of A's steps, or what B waited for its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import torch

from benchmarks.report import Row, publish
from benchmarks.timing import summarize
from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import KVGeometry, pages_for
from petalsd.models.block_config import BlockConfig
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.weights import load_block
from petalsd.types import BlockSpan

DEMO_MODEL = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model"))
CPU = torch.device("cpu")
PROVIDER = "petalsd"
PAGE_TOKENS = 16
KV_TOKENS = 16384
CONTEXT = 256
WORKS = ("prefill", "forward pass", "backward pass")
ALONE_S = 1.0
WARM_UP_STEPS = 20

Work: TypeAlias = Callable[[], Awaitable[object]]


def main() -> None:
    parser = argparse.ArgumentParser(description="A decoding client beside the long work of another.")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--tokens", type=int, default=2048, help="of the other client's work")
    parser.add_argument("--pass-rows", type=int, default=4, help="rows that a pass cuts its tokens into")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    publish("interference", asyncio.run(measure(parser.parse_args())))


async def measure(options: argparse.Namespace) -> list[Row]:
    """Rows of every kind of work, each beside the same client's undisturbed steps."""
    torch.manual_seed(0)
    setting = f"{options.dtype}, context {CONTEXT}, {options.threads} thread(s)"
    async with serving(options.model.resolve(), getattr(torch, options.dtype), options.threads) as engine:
        rounds = Rounds(engine, options.tokens, options.pass_rows)
        works = {"prefill": rounds.prefill, "forward pass": rounds.forward, "backward pass": rounds.backward}
        rows = []
        for name in options.works:
            title = f"{name} of {options.tokens} tokens"
            rows += await rounds.measure(works[name], title, setting, options.rounds)
        return rows


@asynccontextmanager
async def serving(model: Path, dtype: torch.dtype, num_threads: int) -> AsyncIterator[Engine]:
    """An engine over all blocks of a checkpoint, with room for some long sessions."""
    source = ModelSource(str(model))
    config = BlockConfig.from_hf(source.config())
    rope = Rope(config, dtype, CPU)
    blocks = {
        index: load_block(source, config, index, dtype, CPU, rope=rope) for index in range(config.num_blocks)
    }
    geometry = KVGeometry(PAGE_TOKENS, config.num_kv_heads, config.head_dim, dtype.itemsize)
    pool = KVPool(geometry, pages_for(KV_TOKENS, len(blocks), PAGE_TOKENS), dtype, CPU)
    pool.allocate()
    engine = Engine(EngineLimits(), CPU, num_threads)
    await engine.start()
    try:
        await engine.load_span(blocks, pool, rope)
        yield engine
    finally:
        await engine.stop(deadline_s=30)


class Rounds:
    """Rounds of client A alone and beside client B, who brings ``tokens`` tokens at once."""

    def __init__(self, engine: Engine, tokens: int, pass_rows: int) -> None:
        self._engine = engine
        self._width = engine.hidden_size or 0
        self._tokens = tokens
        self._batch = torch.randn(pass_rows, tokens // pass_rows, self._width)

    async def measure(self, work: Work, name: str, setting: str, num_rounds: int) -> list[Row]:
        """The rows of ``num_rounds`` rounds."""
        alone: list[list[float]] = []
        beside: list[list[float]] = []
        undisturbed_ms: list[float] = []
        disturbed_ms: list[float] = []
        async with self._session(CONTEXT + 1, "a") as session:
            await session.step(Step(torch.randn(1, CONTEXT, self._width), 0))
            for _ in range(WARM_UP_STEPS):
                await self._decode(session)
            for _ in range(num_rounds):
                undisturbed_ms.append(1e3 * await seconds(work))
                alone.append(await self._decode_for(session, ALONE_S))
                steps, took_s = await self._decode_beside(session, work)
                beside.append(steps)
                disturbed_ms.append(1e3 * took_s)
        ratios = [
            percentile_95(after) / statistics.median(before)
            for before, after in zip(alone, beside, strict=True)
        ]
        return [
            *step_rows(alone, f"{setting}, before a {name}"),
            *step_rows(beside, f"{setting}, beside a {name}"),
            row(f"{setting}, beside a {name}", "decode step, p95 over the median alone", "x", ratios),
            row(f"{setting}, nobody decodes", name, "ms", undisturbed_ms),
            row(f"{setting}, beside decode steps", name, "ms", disturbed_ms),
        ]

    async def _decode_for(self, session: Session, duration_s: float) -> list[float]:
        """Milliseconds of the steps of about ``duration_s``."""
        end = time.perf_counter() + duration_s
        samples = [await self._decode(session)]
        while time.perf_counter() < end:
            samples.append(await self._decode(session))
        return samples

    async def _decode_beside(self, session: Session, work: Work) -> tuple[list[float], float]:
        """Milliseconds of the steps until the work is done, one at least, and what that took in seconds."""
        running = asyncio.create_task(seconds(work))
        samples = [await self._decode(session)]
        while not running.done():
            samples.append(await self._decode(session))
        return samples, await running

    async def _decode(self, session: Session) -> float:
        started = time.perf_counter()
        await session.step(Step(self._batch[:1, :1], CONTEXT))
        return 1e3 * (time.perf_counter() - started)

    @asynccontextmanager
    async def _session(self, tokens: int, peer: str) -> AsyncIterator[Session]:
        session = await self._engine.open_session(SessionSpec(self._span(), 1, tokens, peer))
        try:
            yield session
        finally:
            await session.close()

    def _span(self) -> BlockSpan:
        if self._engine.span is None:
            raise RuntimeError("the engine serves no blocks")
        return self._engine.span

    async def prefill(self) -> None:
        async with self._session(self._tokens, "b") as session:
            await session.step(Step(self._batch.view(1, -1, self._width), 0))

    async def forward(self) -> None:
        await self._engine.forward(PassRequest(self._span(), self._batch, "b"))

    async def backward(self) -> None:
        await self._engine.backward(PassRequest(self._span(), self._batch, "b", grad_output=self._batch))


async def seconds(work: Work) -> float:
    """What it took."""
    started = time.perf_counter()
    await work()
    return time.perf_counter() - started


def percentile_95(samples: list[float]) -> float:
    """Interpolated; the largest where there are few."""
    return statistics.quantiles(samples, n=20, method="inclusive")[-1] if len(samples) > 1 else samples[0]


def step_rows(rounds: list[list[float]], setting: str) -> list[Row]:
    """Median and 95th percentile of the decode steps of each round."""
    return [
        row(setting, "decode step, median", "ms", [statistics.median(steps) for steps in rounds]),
        row(setting, "decode step, p95", "ms", [percentile_95(steps) for steps in rounds]),
    ]


def row(setting: str, metric: str, unit: str, samples: list[float]) -> Row:
    return Row(PROVIDER, setting, metric, unit, summarize(samples))


if __name__ == "__main__":
    main()
