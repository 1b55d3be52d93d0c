"""One decode step through one block over loopback, at the client: a bare echo, stock Petals and petalsd.

    python -m benchmarks.step_latency [--providers echo petals petalsd] [--threads 2]

A random block of SmolLM2-135M's shape (hidden 576, 9 heads, 3 KV heads), float32, batch 1. Two real p2pd lie
between client and server. All providers run at once and take turns, so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import torch
import uvloop

from benchmarks.providers import DHT_PREFIX, PROVIDERS, Job, Provider
from benchmarks.report import Row, publish
from benchmarks.timing import summarize
from benchmarks.wire import StepStream, connect
from petalsd.types import BlockSpan
from tests.tiny_models import make_tiny

HIDDEN_SIZE = 576
PREFILL_TOKENS = 64
WARMUP_STEPS = 50
ROUNDS = 6
STEPS_PER_ROUND = 100
MAX_LENGTH = PREFILL_TOKENS + WARMUP_STEPS + ROUNDS * STEPS_PER_ROUND


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of one decode step through one block.")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of each server"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        job = Job(make_block(Path(directory) / "model"), BlockSpan(0, 1), Path(directory), options.threads)
        providers = [stack.enter_context(PROVIDERS[name](job)) for name in options.providers]
        samples = uvloop.run(measure(providers))
    setting = f"hidden {HIDDEN_SIZE}, batch 1, {options.threads} thread(s)"
    publish(
        "step_latency",
        [Row(name, setting, "decode step of one block", "ms", summarize(ms)) for name, ms in samples.items()],
    )


def make_block(path: Path) -> Path:
    """A model of one block; the vocabulary is tiny, since no embedding is ever used."""
    make_tiny(
        "llama", path, num_hidden_layers=1, hidden_size=HIDDEN_SIZE, intermediate_size=1536,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, initializer_range=0.02,
    )  # fmt: skip
    return path


async def measure(providers: list[Provider]) -> dict[str, list[float]]:
    """Milliseconds of every step, by provider."""
    samples: dict[str, list[float]] = {provider.name: [] for provider in providers}
    async with contextlib.AsyncExitStack() as stack:
        streams = {provider.name: await open_stream(provider, stack) for provider in providers}
        for _ in range(ROUNDS):
            for name, stream in streams.items():
                samples[name] += [await time_step(stream) for _ in range(STEPS_PER_ROUND)]
    return samples


async def open_stream(provider: Provider, stack: contextlib.AsyncExitStack) -> StepStream:
    p2p, peer_id = await connect(provider.maddr)
    stack.push_async_callback(p2p.shutdown)
    stream = StepStream(p2p, peer_id, f"{DHT_PREFIX}.0", MAX_LENGTH)
    await stream.open()
    stack.push_async_callback(stream.close)
    await stream.step(torch.randn(1, PREFILL_TOKENS, HIDDEN_SIZE))
    for _ in range(WARMUP_STEPS):
        await time_step(stream)
    return stream


async def time_step(stream: StepStream) -> float:
    hidden = torch.randn(1, 1, HIDDEN_SIZE)
    started = time.perf_counter()
    await stream.step(hidden)
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    main()
