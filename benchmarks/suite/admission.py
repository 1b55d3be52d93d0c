"""How many sessions a server admits at the same cache, when clients ask for 2048 tokens and use few of them.

Each session asks for 2048 tokens and then really uses a length drawn from a realistic mix: log-normal, 200 on
average, a few long ones. Four clients open sessions in turns, which stay, until one is refused. Both servers
have their default cache of 16384 tokens for each block, and hold one block of the model. petalsd also promises
room in its spill file, as it does by default on a disk. The count is a promise, not a speed: one round is enough.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import torch
import uvloop
from hivemind.p2p import P2PDaemonError, P2PHandlerError

from benchmarks.benchmark import Benchmark, Options, say
from benchmarks.providers import Provider
from benchmarks.report import Row
from benchmarks.timing import summarize
from benchmarks.wire import StepStream, connect

ASKED_TOKENS = 2048
MEAN_TOKENS = 200
SIGMA = 0.8
MAX_SESSIONS = 256  # petalsd's own default limit
MESSAGE_TOKENS = 256
CLIENTS = 4  # a server may bound what one peer gets
REFUSALS = (P2PHandlerError, P2PDaemonError, StopAsyncIteration, ConnectionError)


def run(options: Options) -> list[Row]:
    setting = {"asked": ASKED_TOKENS, "used_mean": MEAN_TOKENS, "threads": options.threads}
    lengths = draw_lengths(2 if options.smoke else MAX_SESSIONS, random.Random(0))
    rows = []
    for provider in options.serve_block(options.model, options.servers):
        count = uvloop.run(count_admitted(provider, lengths))
        say(f"  {provider.name} admits {count}")
        rows.append(Row(provider.name, setting, "sessions admitted", "sessions", summarize([count])))
    return rows


def draw_lengths(count: int, source: random.Random) -> list[int]:
    """Tokens that each session uses: log-normal with a mean of MEAN_TOKENS, from 1 to ASKED_TOKENS."""
    lengths = [source.lognormvariate(0.0, SIGMA) for _ in range(count)]
    scale = MEAN_TOKENS * len(lengths) / sum(lengths)
    return [min(ASKED_TOKENS, max(1, round(scale * length))) for length in lengths]


async def count_admitted(provider: Provider, lengths: Sequence[int]) -> int:
    """Sessions that were open at once, each filled to its length, before the first refusal."""
    async with contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(connect(provider.maddr)) for _ in range(CLIENTS)]
        opened: list[StepStream] = []
        for count, length in enumerate(lengths):
            stream = connections[count % CLIENTS].stream(provider.uid, ASKED_TOKENS)
            try:
                opened.append(await stack.enter_async_context(stream))
                await fill(opened[-1], length, provider.hidden_size)
            except REFUSALS:
                if count:  # a server that died refuses, too: the first session still answers, or this raises
                    await opened[0].step(torch.randn(1, 0, provider.hidden_size))
                return count
    return len(lengths)


async def fill(stream: StepStream, length: int, hidden_size: int) -> None:
    for start in range(0, length, MESSAGE_TOKENS):
        await stream.step(torch.randn(1, min(MESSAGE_TOKENS, length - start), hidden_size))


BENCHMARK = Benchmark(
    "admission", "sessions open at once in the default cache, asking for 2048 tokens and using 200", run, 20.0
)
