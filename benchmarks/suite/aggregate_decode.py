"""Sessions that decode at once through a server of all blocks: steps per second over all of them.

Eight clients, and one for what batching adds. With ``--compare`` the same loads run against a stock Petals server,
in turns, and Petals' own client is one of the loads. Server and clients share the machine's cores, as everywhere
in this suite.
"""

from __future__ import annotations

import contextlib

from benchmarks.benchmark import Benchmark, Options
from benchmarks.loads import LOADS, Load, LoadShape, clients
from benchmarks.providers import Provider
from benchmarks.report import Row
from benchmarks.timing import summarize

SESSIONS = (8, 1)
PREFILL = 64
WARM_UP_STEPS = 2
ROUNDS = 4
STEPS_PER_ROUND = 8
FORMATS = ("float32", "bfloat16")


def run(options: Options) -> list[Row]:
    rows = []
    for kind in FORMATS[:1] if options.smoke else FORMATS:
        if not options.has_time(f"servers in {kind}", 20.0):
            continue
        providers = options.serve(kind)
        for client in clients(with_stock=options.compare):
            for sessions in (2,) if options.smoke else SESSIONS:
                if options.has_time(f"{sessions} sessions of client {client} in {kind}"):
                    rows += measure(providers, client, sessions, options)
    return rows


def measure(providers: list[Provider], client: str, sessions: int, options: Options) -> list[Row]:
    """Steps per second over all sessions of each provider; one sample per round."""
    rounds, steps = (2, 2) if options.smoke else (ROUNDS, STEPS_PER_ROUND)
    shape = LoadShape(sessions, PREFILL, WARM_UP_STEPS + rounds * steps)
    with contextlib.ExitStack() as stack:
        loads: dict[str, Load] = {
            provider.name: stack.enter_context(LOADS[client](provider, shape, options.fleet))
            for provider in providers
        }
        for load in loads.values():
            load.decode(WARM_UP_STEPS)
        samples: dict[str, list[float]] = {name: [] for name in loads}
        for _ in range(rounds):
            for name, load in loads.items():
                samples[name].append(sessions * steps / load.decode(steps))
    job = providers[0].job
    setting = {"format": job.dtype, "client": client, "sessions": sessions, "threads": job.threads}
    return [
        Row(name, setting, "aggregate decode", "steps/s", summarize(rates)) for name, rates in samples.items()
    ]


BENCHMARK = Benchmark(
    "aggregate_decode",
    "steps per second over all sessions that decode at once through one server",
    run,
    65.0,
)
