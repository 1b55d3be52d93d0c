"""The second turn of a conversation: what a client waits for the first token when most of its prompt is known.

A client sends a prompt in a session of its own, takes the answer and ends it, as chats without a memory do. Then
it opens another session with that prompt and some tokens more. Each time is from opening the stream to the answer,
at the smallest client there is, with all blocks of the model at one server and nobody else there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import uvloop

from benchmarks.benchmark import Benchmark, Options
from benchmarks.providers import Provider
from benchmarks.report import Row
from benchmarks.timing import summarize
from benchmarks.wire import connect, time_first_token

ROUNDS = 3
FORMAT = "float32"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of the first prompt, and how many come to it."""

    prompt: int = 512
    more: int = 32


SMOKE_SIZES = Sizes(64, 8)


def run(options: Options) -> list[Row]:
    rounds, sizes = (1, SMOKE_SIZES) if options.smoke else (ROUNDS, Sizes())
    samples: dict[str, dict[str, list[float]]] = {}
    providers = options.serve(FORMAT)
    took_s = 0.0
    for number in range(rounds):
        if number and not options.has_time(f"round {number + 1}", took_s):
            break
        began_s = time.monotonic()
        for provider in providers:
            for metric, milliseconds in uvloop.run(measure(provider, sizes)).items():
                samples.setdefault(provider.name, {}).setdefault(metric, []).append(milliseconds)
        took_s = time.monotonic() - began_s
    setting: dict[str, int | str] = {"format": FORMAT, "threads": options.threads}
    return [
        Row(name, setting, metric, "ms", summarize(milliseconds))
        for name, metrics in samples.items()
        for metric, milliseconds in metrics.items()
    ]


async def measure(provider: Provider, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of both turns of a conversation that nobody has had before, by metric."""
    conversation = torch.randn(1, sizes.prompt + sizes.more, provider.hidden_size)
    async with connect(provider.maddr) as client:
        await time_first_token(client, provider.uid, torch.randn(1, 1, provider.hidden_size))  # dials
        first = await time_first_token(client, provider.uid, conversation[:, : sizes.prompt])
        second = await time_first_token(client, provider.uid, conversation)
    return {
        f"time to first token of {sizes.prompt} tokens": first,
        f"time to first token of the same and {sizes.more} more": second,
    }


BENCHMARK = Benchmark(
    "conversation", "time to first token of a prompt, and of the same with some more tokens", run, 20.0
)
