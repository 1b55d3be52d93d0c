"""What a client that decodes feels of another one's prompt of 2048 tokens, and what a new client waits for.

Client A decodes without a pause, through all blocks of one server; each round it is first alone, then client B
opens a session and sends its whole prompt in one message. Then seven clients decode, and another one arrives with
a shorter prompt: its time to first token is from opening its stream to the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import torch
import uvloop

from benchmarks.benchmark import Benchmark, Options
from benchmarks.providers import Provider
from benchmarks.report import Row
from benchmarks.timing import summarize
from benchmarks.wire import Connection, StepStream, connect, time_step

CONTEXT = 256
LONG_PROMPT = 2048
SHORT_PROMPT = 128
DECODING = 7
ROUNDS = 4
ALONE_STEPS = 25
MAX_STEPS = 4096  # of a session that decodes for as long as another works
FORMAT = "float32"


def run(options: Options) -> list[Row]:
    samples: dict[str, dict[str, list[float]]] = {}
    providers = options.serve(FORMAT)
    for round_number in range(1 if options.smoke else ROUNDS):
        for provider in providers:
            if round_number == 0 or options.has_time(f"round {round_number + 1} of {provider.name}", 5.0):
                found = uvloop.run(measure_round(provider, options.smoke))
                for metric, milliseconds in found.items():
                    samples.setdefault(provider.name, {}).setdefault(metric, []).extend(milliseconds)
    setting: dict[str, int | str] = {"format": FORMAT, "threads": options.threads}
    return [
        Row(name, setting, metric, "ms", summarize(milliseconds))
        for name, metrics in samples.items()
        for metric, milliseconds in metrics.items()
    ]


async def measure_round(provider: Provider, is_smoke: bool) -> dict[str, list[float]]:
    """Milliseconds by metric."""
    context, long, short = (16, 64, 16) if is_smoke else (CONTEXT, LONG_PROMPT, SHORT_PROMPT)
    size, count = provider.hidden_size, 2 if is_smoke else DECODING
    async with connect(provider.maddr) as old, connect(provider.maddr) as new:
        await time_first_token(new, provider, 1)  # dials
        async with decoding_streams(old, provider, 1, context) as (stream,):
            alone = [await time_step(stream, size, 1) for _ in range(ALONE_STEPS)]
            prompt = asyncio.create_task(time_first_token(new, provider, long))
            beside = await decode_until(stream, size, prompt)
        undisturbed = await time_first_token(new, provider, short)
        async with decoding_streams(old, provider, count, context) as streams:
            prompt = asyncio.create_task(time_first_token(new, provider, short))
            await asyncio.gather(*(decode_until(stream, size, prompt) for stream in streams))
    return {
        "decode step, alone": alone,
        f"decode step, beside a prompt of {long}": beside,
        f"time to first token of {short}, alone": [undisturbed],
        f"time to first token of {short}, {count} decode": [prompt.result()],
    }


@contextlib.asynccontextmanager
async def decoding_streams(
    connection: Connection, provider: Provider, count: int, context: int
) -> AsyncIterator[list[StepStream]]:
    """Sessions with ``context`` tokens behind them, and a decode step that is not counted."""
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(connection.stream(provider.uid, context + MAX_STEPS))
            for _ in range(count)
        ]
        for stream in streams:
            await time_step(stream, provider.hidden_size, context)
            await time_step(stream, provider.hidden_size, 1)
        yield streams


async def decode_until(stream: StepStream, hidden_size: int, other: asyncio.Task[float]) -> list[float]:
    """Milliseconds of the steps that began before ``other`` was done; one at least."""
    samples = [await time_step(stream, hidden_size, 1)]
    while not other.done():
        samples.append(await time_step(stream, hidden_size, 1))
    return samples


async def time_first_token(connection: Connection, provider: Provider, tokens: int) -> float:
    """Milliseconds from opening a session to the answer to its prompt of ``tokens``."""
    hidden = torch.randn(1, tokens, provider.hidden_size)
    started = time.perf_counter()
    async with connection.stream(provider.uid, tokens + 1) as stream:
        await stream.step(hidden)
        return (time.perf_counter() - started) * 1e3


BENCHMARK = Benchmark(
    "interference",
    "a decode step beside another client's prompt; time to first token while others decode",
    run,
    60.0,
)
