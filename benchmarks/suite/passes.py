"""Forward and backward passes through all blocks, as fine-tuning through the swarm needs them: tokens per second.

In this process petalsd's runner of passes beside transformers on the same weights; and, against a server, both
kinds of servers by petalsd's client. The blocks' weights are frozen: the gradient is that of the hidden states.
"""

from __future__ import annotations

import time

import torch

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import CPU, LocalModel, ReferenceModel, formats, load_models
from benchmarks.providers import DHT_PREFIX, Provider
from benchmarks.report import OURS, TRANSFORMERS, Row
from benchmarks.timing import Work, summarize, take_turns
from petalsd.client.runtime import ClientRuntime
from petalsd.client.swarm_client import SwarmClient
from petalsd.engine.block_units import Pace
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.engine.passes import PassRunner
from petalsd.engine.step import PassRequest

ROWS = 2
TOKENS = 128
SERVER_ROUNDS = 3
MAX_PASS_TOKENS = 2048


def run(options: Options) -> list[Row]:
    tokens = 16 if options.smoke else TOKENS
    rows = []
    for kind in formats():
        if options.has_time(f"passes in {kind}"):
            rows += measure_here(kind, tokens, options)
    return rows + measure_servers(tokens, options)


def measure_here(kind: str, tokens: int, options: Options) -> list[Row]:
    model, reference = load_models(options.model, kind)
    hidden = torch.randn(ROWS, tokens, model.config.hidden_size).to(model.dtype)
    torch.set_num_threads(options.threads)
    rows = []
    for is_backward in (False, True):
        works: dict[str, Work] = {OURS: our_pass(model, hidden, is_backward)}
        if reference is not None:
            works[TRANSFORMERS] = their_pass(reference, hidden, is_backward)
        samples = take_turns(works, options.pace)
        rows += pass_rows(samples, {"format": kind, "where": "process"}, tokens, is_backward, options)
    return rows


def our_pass(model: LocalModel, hidden: torch.Tensor, is_backward: bool) -> Work:
    runner = PassRunner(model.blocks, model.dtype, CPU, MAX_PASS_TOKENS)
    pace = Pace(AttentionShare.of(model.config), MAX_PASS_TOKENS)  # nothing waits: units as large as can be
    request = PassRequest(model.span, hidden, "benchmark", grad_output=hidden if is_backward else None)

    def work() -> None:
        for _ in runner.start(request, pace):
            pass

    return work


def their_pass(reference: ReferenceModel, hidden: torch.Tensor, is_backward: bool) -> Work:
    def forward() -> None:
        with torch.inference_mode():
            reference.model(inputs_embeds=hidden, use_cache=False)

    def backward() -> None:
        inputs = hidden.clone().requires_grad_()
        reference.model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(hidden)

    return backward if is_backward else forward


def measure_servers(tokens: int, options: Options) -> list[Row]:
    """Through petalsd's client; every server answers forward and backward in turns with the others."""
    rounds = 1 if options.smoke else SERVER_ROUNDS
    rows = []
    providers = options.serve()
    for is_backward in (False, True):
        samples: dict[str, list[float]] = {provider.name: [] for provider in providers}
        for _ in range(rounds):
            for provider in providers:
                samples[provider.name].append(time_remote_pass(provider, tokens, is_backward))
        setting = {"format": "float32", "where": "server"}
        rows += pass_rows(samples, setting, tokens, is_backward, options)
    return rows


def time_remote_pass(provider: Provider, tokens: int, is_backward: bool) -> float:
    """Seconds of one pass; a backward pass follows a forward one, which is not counted."""
    hidden = torch.randn(ROWS, tokens, provider.hidden_size)

    async def measure() -> float:
        async with SwarmClient(DHT_PREFIX, len(provider.job.span), [provider.maddr]) as client:
            await client.passes.forward(hidden[:, :1], None)  # connections are open from here on
            started = time.perf_counter()
            trace = await client.passes.forward(hidden, None)
            if is_backward:
                started = time.perf_counter()
                await client.passes.backward(trace, hidden, None)
            return time.perf_counter() - started

    with ClientRuntime() as runtime:
        return runtime.run(measure())


def pass_rows(
    samples: dict[str, list[float]], setting: dict[str, str], tokens: int, is_backward: bool, options: Options
) -> list[Row]:
    whole = {**setting, "rows": ROWS, "tokens": tokens, "threads": options.threads}
    metric = "backward pass" if is_backward else "forward pass"
    return [
        Row(name, whole, metric, "tokens/s", summarize([ROWS * tokens / each for each in seconds]))
        for name, seconds in samples.items()
    ]


BENCHMARK = Benchmark(
    "passes", "forward and backward passes through all blocks, tokens per second", run, 45.0
)
