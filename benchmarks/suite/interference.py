"""What a client that decodes feels of others' long work, and what a new client waits for its first token.

Client A decodes without a pause, through all blocks of one server; each round first alone, then beside client B,
who opens a session and sends a prompt of 2048 tokens in one message, and beside client C's passes of 4 rows of 256
tokens. Then seven clients decode, and another one arrives with a short prompt: its time to first token is from
opening its stream to the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import uvloop

from benchmarks.benchmark import Benchmark, Options
from benchmarks.providers import DHT_PREFIX, Provider
from benchmarks.report import Row
from benchmarks.timing import summarize
from benchmarks.wire import Connection, StepStream, connect, time_step
from petalsd.client.swarm_client import SwarmClient

ROUNDS = 3
ALONE_STEPS = 25
# Steps that a session may take beside others' work; stock Petals reserves them all, out of 16384 tokens.
MAX_STEPS = 4096
MAX_STEPS_OF_EACH = 1024
FORMAT = "float32"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of the decoding sessions' contexts, both prompts and the passes, and how many sessions decode."""

    context: int = 256
    long_prompt: int = 2048
    short_prompt: int = 128
    pass_rows: int = 4
    pass_tokens: int = 256
    decoding: int = 7


SMOKE_SIZES = Sizes(16, 64, 16, 2, 16, 2)


def run(options: Options) -> list[Row]:
    samples: dict[str, dict[str, list[float]]] = {}
    providers = options.serve(FORMAT)
    for round_number in range(1 if options.smoke else ROUNDS):
        for provider in providers:
            if round_number == 0 or options.has_time(f"round {round_number + 1} of {provider.name}", 5.0):
                found = uvloop.run(measure_round(provider, SMOKE_SIZES if options.smoke else Sizes()))
                for metric, milliseconds in found.items():
                    samples.setdefault(provider.name, {}).setdefault(metric, []).extend(milliseconds)
    setting: dict[str, int | str] = {"format": FORMAT, "threads": options.threads}
    return [
        Row(name, setting, metric, "ms", summarize(milliseconds))
        for name, metrics in samples.items()
        for metric, milliseconds in metrics.items()
    ]


async def measure_round(provider: Provider, sizes: Sizes) -> dict[str, list[float]]:
    """Milliseconds by metric."""
    async with (
        connect(provider.maddr) as old,
        connect(provider.maddr) as new,
        SwarmClient(DHT_PREFIX, len(provider.job.span), [provider.maddr]) as trainer,
    ):
        await time_first_token(new, provider, 1)  # dials
        steps = await measure_steps(provider, sizes, old, new, trainer)
        return {**steps, **await measure_first_token(provider, sizes, old, new)}


async def measure_steps(
    provider: Provider, sizes: Sizes, old: Connection, new: Connection, trainer: SwarmClient
) -> dict[str, list[float]]:
    """A client's decode steps, alone and beside each kind of long work."""
    hidden = torch.randn(sizes.pass_rows, sizes.pass_tokens, provider.hidden_size)
    async with decoding_streams(old, provider, [MAX_STEPS], sizes.context) as (stream,):
        alone = [await time_step(stream, provider.hidden_size, 1) for _ in range(ALONE_STEPS)]
        prompt = time_first_token(new, provider, sizes.long_prompt)
        beside_prompt = await decode_beside(stream, provider, prompt)
        trace = await trainer.passes.forward(hidden, None)
        beside_forward = await decode_beside(stream, provider, trainer.passes.forward(hidden, None))
        backward = trainer.passes.backward(trace, hidden, None)
        beside_backward = await decode_beside(stream, provider, backward)
    return {
        "decode step, alone": alone,
        f"decode step, beside a prompt of {sizes.long_prompt}": beside_prompt,
        "decode step, beside a forward pass": beside_forward,
        "decode step, beside a backward pass": beside_backward,
    }


async def measure_first_token(
    provider: Provider, sizes: Sizes, old: Connection, new: Connection
) -> dict[str, list[float]]:
    """A new client's first token, alone and while others decode."""
    alone = await time_first_token(new, provider, sizes.short_prompt)
    max_steps = [MAX_STEPS_OF_EACH] * sizes.decoding
    async with decoding_streams(old, provider, max_steps, sizes.context) as streams:
        prompt = asyncio.create_task(time_first_token(new, provider, sizes.short_prompt))
        await asyncio.gather(*(decode_until(stream, provider, prompt) for stream in streams))
    metric = f"time to first token of {sizes.short_prompt}"
    return {f"{metric}, alone": [alone], f"{metric}, {sizes.decoding} decode": [prompt.result()]}


@contextlib.asynccontextmanager
async def decoding_streams(
    connection: Connection, provider: Provider, max_steps: Sequence[int], context: int
) -> AsyncIterator[list[StepStream]]:
    """A session for each entry of ``max_steps``, ``context`` tokens and a step that is not counted behind it."""
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(connection.stream(provider.uid, context + steps))
            for steps in max_steps
        ]
        for stream in streams:
            await time_step(stream, provider.hidden_size, context)
            await time_step(stream, provider.hidden_size, 1)
        yield streams


async def decode_beside(
    stream: StepStream, provider: Provider, work: Coroutine[Any, Any, object]
) -> list[float]:
    """Milliseconds of the steps that began before ``work`` was done; one at least."""
    task = asyncio.create_task(work)
    samples = await decode_until(stream, provider, task)
    await task
    return samples


async def decode_until(stream: StepStream, provider: Provider, other: asyncio.Task[Any]) -> list[float]:
    samples = [await time_step(stream, provider.hidden_size, 1)]
    while not other.done():
        samples.append(await time_step(stream, provider.hidden_size, 1))
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
    "a decode step beside others' prompts and passes; time to first token while others decode",
    run,
    60.0,
)
