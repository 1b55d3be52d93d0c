"""Eight sessions that decode at once through all blocks of the demo model: steps per second over all of them.

    python -m benchmarks.aggregate_decode [--model .cache/demo-model] [--providers petals petalsd] [--threads 2]

One server holds all 30 blocks in float32; eight streams of batch 1 each send a step as soon as the last one was
answered. The providers run one after the other in the same run: each has the whole machine. The first row of each
is a single session, for what batching adds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import uvloop

from benchmarks.providers import DHT_PREFIX, PROVIDERS, Job
from benchmarks.report import Row, publish
from benchmarks.timing import Spread, summarize
from benchmarks.wire import StepStream, connect
from petalsd.types import BlockSpan

DEMO_MODEL = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model"))
CORES = len(os.sched_getaffinity(0))

SESSIONS = (1, 8)
PREFILL_TOKENS = 64
WARMUP_STEPS = 4
ROUNDS = 5
STEPS_PER_ROUND = 8
MAX_LENGTH = PREFILL_TOKENS + WARMUP_STEPS + ROUNDS * STEPS_PER_ROUND


def main() -> None:
    parser = argparse.ArgumentParser(description="Aggregate decode speed of several sessions.")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument(
        "--providers", nargs="+", choices=("petals", "petalsd"), default=["petals", "petalsd"]
    )
    parser.add_argument("--threads", type=int, default=CORES, help="CPU threads of the server")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = json.loads((options.model / "config.json").read_text())
    span = BlockSpan(0, config["num_hidden_layers"])
    rows = []
    for name in options.providers:
        with tempfile.TemporaryDirectory() as directory:
            job = Job(options.model.resolve(), span, Path(directory), options.threads)
            with PROVIDERS[name](job) as provider:
                for num_sessions in SESSIONS:
                    spread = uvloop.run(measure(provider.maddr, span, config["hidden_size"], num_sessions))
                    setting = f"{num_sessions} session(s), {len(span)} blocks, {options.threads} thread(s)"
                    rows.append(Row(provider.name, setting, "aggregate decode", "steps/s", spread))
    publish("aggregate_decode", rows)


async def measure(maddr: str, span: BlockSpan, hidden_size: int, num_sessions: int) -> Spread:
    """Steps per second over all sessions, one sample per round."""
    uid = " ".join(f"{DHT_PREFIX}.{block}" for block in span)
    async with contextlib.AsyncExitStack() as stack:
        p2p, peer_id = await connect(maddr)
        stack.push_async_callback(p2p.shutdown)
        streams = [StepStream(p2p, peer_id, uid, MAX_LENGTH) for _ in range(num_sessions)]
        for stream in streams:
            await stream.open()
            stack.push_async_callback(stream.close)
            await stream.step(torch.randn(1, PREFILL_TOKENS, hidden_size))
        await decode(streams, WARMUP_STEPS, hidden_size)
        return summarize([await decode(streams, STEPS_PER_ROUND, hidden_size) for _ in range(ROUNDS)])


async def decode(streams: list[StepStream], num_steps: int, hidden_size: int) -> float:
    """All streams take ``num_steps`` steps at once; steps per second."""
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(_decode_one(stream, num_steps, hidden_size))
    return num_steps * len(streams) / (time.perf_counter() - started)


async def _decode_one(stream: StepStream, num_steps: int, hidden_size: int) -> None:
    for _ in range(num_steps):
        await stream.step(torch.randn(1, 1, hidden_size))


if __name__ == "__main__":
    main()
