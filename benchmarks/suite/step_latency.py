"""One decode step through one block over loopback, at the client: a bare echo, petalsd, and stock Petals.

A random block of SmolLM2-135M's shape (hidden 576, 9 heads, 3 KV heads), batch 1, in float32 and in bfloat16,
which petalsd serves unless it is told otherwise; states are sent in float32. Two real p2pd lie between client and
server, and the client is the smallest that there is. The echo is what the wire alone costs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import uvloop

from benchmarks.benchmark import Benchmark, Options
from benchmarks.providers import Provider
from benchmarks.report import Row
from benchmarks.timing import summarize
from benchmarks.wire import connect, time_step
from tests.tiny_models import make_tiny

HIDDEN_SIZE = 576
PREFILL_TOKENS = 64
WARM_UP_STEPS = 50
ROUNDS = 6
STEPS_PER_ROUND = 100


def run(options: Options) -> list[Row]:
    rounds, steps = (1, 3) if options.smoke else (ROUNDS, STEPS_PER_ROUND)
    model = make_blocks(options.directory / "model", 1)
    providers = options.serve_block(model, ["echo", *options.servers])
    if not options.smoke:
        providers += options.serve_block(model, options.servers, "bfloat16")
    setting = {"hidden": HIDDEN_SIZE, "sessions": 1, "threads": options.threads}
    return [
        Row(
            provider.name, {"format": provider.job.dtype, **setting}, "decode step of one block", "ms",
            summarize(milliseconds),
        )
        for provider, milliseconds in uvloop.run(measure(providers, rounds, steps))
    ]  # fmt: skip


def make_blocks(path: Path, num_blocks: int) -> Path:
    """A model of so many; the vocabulary is tiny, since no embedding is ever used."""
    make_tiny(
        "llama", path, num_hidden_layers=num_blocks, hidden_size=HIDDEN_SIZE, intermediate_size=1536,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, initializer_range=0.02,
    )  # fmt: skip
    return path


async def measure(providers: list[Provider], rounds: int, steps: int) -> list[tuple[Provider, list[float]]]:
    """Milliseconds of every step, by provider."""
    size = providers[0].hidden_size
    max_length = PREFILL_TOKENS + WARM_UP_STEPS + rounds * steps
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for provider in providers:
            connection = await stack.enter_async_context(connect(provider.maddr))
            stream = connection.stream(provider.uid, max_length)
            streams.append(await stack.enter_async_context(stream))
        for stream in streams:
            await time_step(stream, size, PREFILL_TOKENS)
            for _ in range(WARM_UP_STEPS):
                await time_step(stream, size, 1)
        samples: list[list[float]] = [[] for _ in providers]
        for _ in range(rounds):
            for stream, milliseconds in zip(streams, samples, strict=True):
                milliseconds += [await time_step(stream, size, 1) for _ in range(steps)]
    return list(zip(providers, samples, strict=True))


BENCHMARK = Benchmark("step_latency", "one decode step through one block over loopback p2p", run, 35.0)
