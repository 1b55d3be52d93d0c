"""What a client that decodes feels of others' long work, and what a new client waits for its first token.

Client A decodes without a pause, through all blocks of one server: alone, then beside client B, who opens a
session and sends a prompt of 2048 tokens in one message, and beside client C's passes of 4 rows of 256 tokens.
Then seven clients decode, and another one arrives with a short prompt: its time to first token is from opening its
stream to the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
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
from benchmarks.wire import Connection, StepStream, connect, time_first_token, time_step
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
    """Whatever the time is enough for, by what it took before: a slow server takes no rounds from a quick one."""
    samples: dict[str, dict[str, list[float]]] = {}
    lasted_s: dict[tuple[str, str], float] = {}
    rounds, sizes = (1, SMOKE_SIZES) if options.smoke else (ROUNDS, Sizes())
    providers = options.serve(FORMAT)
    for number, (part, measure), provider in itertools.product(range(rounds), PARTS.items(), providers):
        key = part, provider.name
        if key in lasted_s and not options.has_time(f"{part} {number + 1} of {provider.name}", lasted_s[key]):
            continue
        began_s = time.monotonic()
        for metric, milliseconds in uvloop.run(measure(provider, sizes)).items():
            samples.setdefault(provider.name, {}).setdefault(metric, []).extend(milliseconds)
        lasted_s[key] = time.monotonic() - began_s
    setting: dict[str, int | str] = {"format": FORMAT, "threads": options.threads}
    return [
        Row(name, setting, metric, "ms", summarize(milliseconds))
        for name, metrics in samples.items()
        for metric, milliseconds in metrics.items()
    ]


async def beside_prompt(provider: Provider, sizes: Sizes) -> dict[str, list[float]]:
    """A client's decode steps, alone and beside a prompt; milliseconds by metric, as of all parts."""
    async with (
        connected(provider, 2) as (old, new),
        decoding_streams(old, provider, [MAX_STEPS], sizes.context) as (stream,),
    ):
        alone = [await time_step(stream, provider.hidden_size, 1) for _ in range(ALONE_STEPS)]
        prompt = first_token_of(new, provider, sizes.long_prompt)
        beside = await decode_beside(stream, provider, prompt)
    return {"decode step, alone": alone, f"decode step, beside a prompt of {sizes.long_prompt}": beside}


async def beside_passes(provider: Provider, sizes: Sizes) -> dict[str, list[float]]:
    """A client's decode steps beside a forward pass, and then beside its backward pass."""
    hidden = torch.randn(sizes.pass_rows, sizes.pass_tokens, provider.hidden_size)
    async with (
        connected(provider, 1) as (old,),
        SwarmClient(DHT_PREFIX, len(provider.job.span), [provider.maddr]) as trainer,
        decoding_streams(old, provider, [MAX_STEPS], sizes.context) as (stream,),
    ):
        trace = await trainer.passes.forward(hidden, None)
        forward = await decode_beside(stream, provider, trainer.passes.forward(hidden, None))
        backward = await decode_beside(stream, provider, trainer.passes.backward(trace, hidden, None))
    return {"decode step, beside a forward pass": forward, "decode step, beside a backward pass": backward}


async def first_token(provider: Provider, sizes: Sizes) -> dict[str, list[float]]:
    """A new client's first token, alone and while others decode."""
    max_steps = [MAX_STEPS_OF_EACH] * sizes.decoding
    async with connected(provider, 2) as (old, new):
        alone = await first_token_of(new, provider, sizes.short_prompt)
        async with decoding_streams(old, provider, max_steps, sizes.context) as streams:
            prompt = asyncio.create_task(first_token_of(new, provider, sizes.short_prompt))
            await asyncio.gather(*(decode_until(stream, provider, prompt) for stream in streams))
    metric = f"time to first token of {sizes.short_prompt}"
    return {f"{metric}, alone": [alone], f"{metric}, {sizes.decoding} decode": [prompt.result()]}


PARTS = {"prompt": beside_prompt, "passes": beside_passes, "first token": first_token}


@contextlib.asynccontextmanager
async def connected(provider: Provider, count: int) -> AsyncIterator[list[Connection]]:
    """That many clients, which have dialled."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(provider.maddr)) for _ in range(count)]
        for client in clients:
            await first_token_of(client, provider, 1)
        yield clients


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


async def first_token_of(connection: Connection, provider: Provider, tokens: int) -> float:
    """Milliseconds that a new client waits for the answer to a prompt of ``tokens``."""
    return await time_first_token(connection, provider.uid, torch.randn(1, tokens, provider.hidden_size))


BENCHMARK = Benchmark(
    "interference",
    "a decode step beside others' prompts and passes; time to first token while others decode",
    run,
    50.0,
)
