"""One session over three servers far from each other: what the ways between them cost a token.

All of it is on this machine; proxies delay each byte by 20 ms. petalsd's client has the servers hand its steps on
to each other, and for comparison does not; with ``--compare`` there are the stock client and stock servers too.
The servers' work is next to nothing: two random blocks of SmolLM2-135M's shape each.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.benchmark import Benchmark, Options
from benchmarks.distance import Distance, Place
from benchmarks.loads import LOADS, Load, LoadShape, petalsd_load
from benchmarks.providers import DHT_PREFIX, Fleet, Job, Provider
from benchmarks.report import OURS, PETALS, Row
from benchmarks.suite.step_latency import HIDDEN_SIZE, make_blocks
from benchmarks.timing import summarize
from petalsd.client.options import ClientOptions
from petalsd.types import BlockSpan
from tests.interop import stock
from tests.interop.child import Child
from tests.interop.daemon import DaemonOptions, ForkedDaemon, petalsd_daemon
from tests.interop.petals_model import make_petals_copy

SPANS = [BlockSpan(first, first + 2) for first in (0, 2, 4)]
ONE_WAY_S = 0.02
PREFILL_TOKENS, WARM_UP_STEPS = 8, 5
ROUNDS, STEPS_PER_ROUND = 4, 10

Open = Callable[[Provider, LoadShape, Fleet], AbstractContextManager[Load]]
Serve = Callable[[Job, Path, Place, list[str]], AbstractContextManager[list[str]]]


def run(options: Options) -> list[Row]:
    rounds, steps = (1, 2) if options.smoke else (ROUNDS, STEPS_PER_ROUND)
    one_way_s, spans = (0.001, SPANS[:2]) if options.smoke else (ONE_WAY_S, SPANS)
    model = make_blocks(options.directory / "model", spans[-1].end)
    rows = []
    for name in options.servers:
        with Distance(one_way_s) as distance, chain(name, model, spans, distance, options) as provider:
            for client, open_load in clients(options.compare).items():
                samples = measure(open_load, provider, options.fleet, rounds, steps)
                setting = {
                    "client": client, "servers": len(spans), "one_way_ms": 1e3 * one_way_s,
                    "hidden": HIDDEN_SIZE, "threads": options.threads,
                }  # fmt: skip
                rows.append(Row(name, setting, "decode step of a chain", "ms", summarize(samples)))
    return rows


def clients(with_stock: bool) -> dict[str, Open]:
    alone = partial(petalsd_load, options=ClientOptions(relay_above_s=math.inf))
    ours: dict[str, Open] = {OURS: LOADS[OURS], f"{OURS}, no relay": alone}
    return {**ours, PETALS: LOADS[PETALS]} if with_stock else ours


def measure(open_load: Open, provider: Provider, fleet: Fleet, rounds: int, steps: int) -> list[float]:
    """Milliseconds of a step, a sample for each round."""
    shape = LoadShape(1, PREFILL_TOKENS, WARM_UP_STEPS + rounds * steps)
    with open_load(provider, shape, fleet) as load:
        load.decode(WARM_UP_STEPS)
        return [1e3 * load.decode(steps) / steps for _ in range(rounds)]


@contextmanager
def chain(
    name: str, model: Path, spans: Sequence[BlockSpan], distance: Distance, options: Options
) -> Iterator[Provider]:
    """Servers of the parts, each in a place of its own; they know the first of them."""
    directory, serve = options.directory / name, SERVERS[name]
    if name == OURS and options.smoke:  # their starts take longest
        serve = partial(petalsd_server, kind=ForkedDaemon)
    with contextlib.ExitStack() as stack:
        maddrs: list[str] = []
        for span in spans:
            job = Job(model, span, options.threads)
            serving = serve(job, directory / str(span.start), distance.place(), maddrs[:1])
            maddrs += stack.enter_context(serving)[:1]
        whole = Job(model, BlockSpan(spans[0].start, spans[-1].end), options.threads)
        yield Provider(name, maddrs[0], whole, directory)


def petalsd_server(
    job: Job, directory: Path, place: Place, peers: list[str], kind: type[Child] = Child
) -> AbstractContextManager[list[str]]:
    swarm = {"host_maddrs": [place.host_maddr], "announce_maddrs": [place.announce_maddr]}
    return petalsd_daemon(
        DaemonOptions(
            model=job.model, directory=directory, dht_prefix=DHT_PREFIX, span=job.span, initial_peers=peers,
            dtype=job.dtype, threads=job.threads, others={"swarm": swarm},
        ),
        kind,
    )  # fmt: skip


def stock_server(
    job: Job, directory: Path, place: Place, peers: list[str]
) -> AbstractContextManager[list[str]]:
    return stock.stock_server(
        stock.ServerOptions(
            model=make_petals_copy(job.model, directory / "model"), directory=directory, dht_prefix=DHT_PREFIX,
            span=job.span, initial_peers=peers, dtype=job.dtype, threads=job.threads,
            host_maddr=place.host_maddr, announce_maddrs=[place.announce_maddr],
        )
    )  # fmt: skip


SERVERS: dict[str, Serve] = {OURS: petalsd_server, PETALS: stock_server}

BENCHMARK = Benchmark("chain", "one decode step through three servers that are 40 ms apart", run, 40.0)
