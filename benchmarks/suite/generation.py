"""One client generates greedily: tokens per second of the whole way, from token ids to token ids.

petalsd's client and, with ``--compare``, the stock one, each against a petalsd server and a stock Petals server.
The local parts of the model (embeddings, head) are the client's own work and are part of the time, on the same
cores as the server, in float32 for both clients.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch

from benchmarks.benchmark import Benchmark, Options
from benchmarks.loads import clients
from benchmarks.providers import DHT_PREFIX, Fleet, Provider
from benchmarks.report import OURS, PETALS, Row
from benchmarks.timing import summarize
from petalsd.client.model import RemoteCausalLM

PROMPT_TOKENS = 8
NEW_TOKENS = 64
ROUNDS = 3
FORMATS = ("float32", "bfloat16")

Generate: TypeAlias = Callable[[int], float]
"""Generates that many new tokens; tokens per second, the prompt's step included in the time."""


def run(options: Options) -> list[Row]:
    rows = []
    for kind in FORMATS[:1] if options.smoke else FORMATS:
        if not options.has_time(f"servers in {kind}", 20.0):
            continue
        providers = options.serve(kind)
        for client in clients(with_stock=options.compare):
            if client in GENERATORS and options.has_time(f"client {client} in {kind}"):
                rows += measure(providers, client, options)
    return rows


def measure(providers: list[Provider], client: str, options: Options) -> list[Row]:
    rounds, new_tokens = (1, 4) if options.smoke else (ROUNDS, NEW_TOKENS)
    samples: dict[str, list[float]] = {provider.name: [] for provider in providers}
    with contextlib.ExitStack() as stack:
        generators = {
            provider.name: stack.enter_context(GENERATORS[client](provider, options.fleet))
            for provider in providers
        }
        for generate in generators.values():
            generate(4)
        for _ in range(rounds):
            for name, generate in generators.items():
                samples[name].append(generate(new_tokens))
    job = providers[0].job
    setting = {"format": job.dtype, "client": client, "tokens": new_tokens, "threads": job.threads}
    return [Row(name, setting, "generation", "tokens/s", summarize(rates)) for name, rates in samples.items()]


def prompt() -> list[list[int]]:
    return [[17 * (position + 1) % 251 for position in range(PROMPT_TOKENS)]]


@contextmanager
def petalsd_client(provider: Provider, fleet: Fleet) -> Iterator[Generate]:
    torch.set_num_threads(1)  # as the stock client: the server beside it wants the cores
    with RemoteCausalLM.from_pretrained(
        provider.job.model, initial_peers=[provider.maddr], dht_prefix=DHT_PREFIX, dtype=torch.float32
    ) as model:
        input_ids = torch.tensor(prompt())

        def generate(new_tokens: int) -> float:
            started = time.perf_counter()
            ids = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
            return (ids.shape[1] - PROMPT_TOKENS) / (time.perf_counter() - started)

        yield generate


@contextmanager
def stock_client(provider: Provider, fleet: Fleet) -> Iterator[Generate]:
    client, swarm = fleet.stock_client, provider.swarm

    def generate(new_tokens: int) -> float:
        answer = client.call("generate", swarm=swarm, input_ids=prompt(), max_new_tokens=new_tokens)
        return (len(answer["output_ids"][0]) - PROMPT_TOKENS) / float(answer["seconds"])

    yield generate


GENERATORS: dict[str, Callable[[Provider, Fleet], AbstractContextManager[Generate]]] = {
    OURS: petalsd_client,
    PETALS: stock_client,
}

BENCHMARK = Benchmark("generation", "one client generates 64 tokens, from token ids to token ids", run, 60.0)
