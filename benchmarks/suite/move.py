"""What clients feel of a server that moves: four decode on blocks that stay, four on blocks that it leaves.

One server of petalsd serves half of the blocks and is told to move by half of that, there and back again; another
one serves all blocks, and takes the sessions that have to leave. New blocks are loaded meanwhile, on the same
cores. The longest step is that of one session in one move, or in the seconds before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import uvloop

from benchmarks.benchmark import Benchmark, Options
from benchmarks.providers import DHT_PREFIX, Provider, whole_model
from benchmarks.report import OURS, Row
from benchmarks.timing import summarize
from petalsd.cli.petalsctl.connection import Connection
from petalsd.cli.petalsctl.context import SLOW_ANSWER_TIMEOUT_S
from petalsd.client.options import ClientOptions
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.daemon.routes import OnlyTo
from tests.interop.daemon import DaemonOptions, petalsd_daemon

MOVES = 3
REST_S = 1.5
SESSIONS = 4
CONTEXT, MAX_TOKENS = 64, 256
FORMAT = "float32"


@dataclass(frozen=True, slots=True)
class Mover:
    """The server that moves between ``places``, which have ``kept`` in common."""

    maddr: str
    socket: Path
    places: tuple[BlockSpan, BlockSpan]

    @property
    def peer(self) -> str:
        return self.maddr.rpartition("/p2p/")[2]

    @property
    def kept(self) -> BlockSpan:
        kept = self.places[0].intersect(self.places[1])
        assert kept is not None
        return kept

    def move(self, to: BlockSpan) -> None:
        """Returns when ``to`` is served."""
        body = {"to": str(to), "wait": True}
        for _ in Connection(self.socket).follow("/v1/rebalance", body, SLOW_ANSWER_TIMEOUT_S):
            pass


class Decoder:
    """One session that decodes until ``is_over``; ``steps`` are (begin, end) in seconds."""

    def __init__(self, session: InferenceSession, hidden_size: int) -> None:
        self._session = session
        self._hidden_size = hidden_size
        self.steps: list[tuple[float, float]] = []
        self.has_begun = asyncio.Event()
        self.is_over = False

    async def run(self) -> None:
        async with self._session as session:
            await session.step(torch.randn(1, CONTEXT, self._hidden_size))
            self.has_begun.set()
            while not self.is_over:
                if session.position == session.max_tokens:
                    session.position = CONTEXT
                began_s = time.perf_counter()
                await session.step(torch.randn(1, 1, self._hidden_size))
                self.steps.append((began_s, time.perf_counter()))

    def between(self, start_s: float, end_s: float) -> list[float]:
        """Milliseconds of the steps that were under way then."""
        return [(end - begin) * 1e3 for begin, end in self.steps if end > start_s and begin < end_s]


def run(options: Options) -> list[Row]:
    # Alone: a move of stock Petals ends all sessions, so there is nothing to compare.
    (whole,) = options.fleet.serve([OURS], whole_model(options.model, options.threads, FORMAT))
    with moving_server(whole, options.directory) as mover:
        samples = uvloop.run(measure(options, whole, mover))
    setting: dict[str, int | str] = {"format": FORMAT, "threads": options.threads, "sessions": 2 * SESSIONS}
    return [
        Row(OURS, setting, metric, "ms", summarize(milliseconds)) for metric, milliseconds in samples.items()
    ]


@contextlib.contextmanager
def moving_server(whole: Provider, directory: Path) -> Iterator[Mover]:
    """Beside ``whole``, at the first blocks; it does not move unless it is told to."""
    length = max(2, len(whole.job.span) // 2)
    places = BlockSpan(0, length), BlockSpan(length // 2, length // 2 + length)
    options = DaemonOptions(
        whole.job.model, directory / "mover", DHT_PREFIX, length, [whole.maddr], FORMAT, whole.job.threads,
        {"blocks": {"balance_quality": 0.0, "join_delay_s": 0.0}, "daemon": {"drain_deadline_s": 10.0}},
    )  # fmt: skip
    with petalsd_daemon(options) as maddrs:
        yield Mover(maddrs[0], options.directory / "control.sock", places)


async def measure(options: Options, whole: Provider, mover: Mover) -> dict[str, list[float]]:
    """Milliseconds by metric."""
    samples: dict[str, list[float]] = {}
    node = Node(NodeOptions(initial_peers=(whole.maddr, mover.maddr), client_mode=True))
    await node.start()
    try:
        for number in range(1 if options.smoke else MOVES):
            if number == 0 or options.has_time(f"move {number + 1}", 3 * REST_S):
                old, new = mover.places[:: 1 if number % 2 == 0 else -1]
                rest_s = 0.1 if options.smoke else REST_S
                for metric, milliseconds in (
                    await measure_move(node, whole, mover, (old, new), rest_s)
                ).items():
                    samples.setdefault(metric, []).extend(milliseconds)
    finally:
        await node.stop()
    return samples


async def measure_move(
    node: Node, whole: Provider, mover: Mover, route: tuple[BlockSpan, BlockSpan], rest_s: float
) -> dict[str, list[float]]:
    old, new = route
    staying = [Decoder(session(node, mover.peer, mover.kept), whole.hidden_size) for _ in range(SESSIONS)]
    leaving = [Decoder(session(node, mover.peer, old), whole.hidden_size) for _ in range(SESSIONS)]
    async with decoding([*staying, *leaving]):
        rested_s = time.perf_counter()
        await asyncio.sleep(rest_s)
        began_s = time.perf_counter()
        await asyncio.to_thread(mover.move, new)
        ended_s = time.perf_counter()
    samples: dict[str, list[float]] = {}
    for name, decoders in (("stay", staying), ("are left", leaving)):
        for when, span in (("at rest", (rested_s, began_s)), ("during the move", (began_s, ended_s))):
            each = [decoder.between(*span) for decoder in decoders]
            samples[f"decode step on blocks that {name}, {when}"] = [step for steps in each for step in steps]
            samples[f"longest step on blocks that {name}, {when}"] = [max(steps) for steps in each]
    return samples


def session(node: Node, peer: str, blocks: BlockSpan) -> InferenceSession:
    terms = StreamTerms(DHT_PREFIX, MAX_TOKENS, ClientOptions())
    return InferenceSession(OnlyTo(peer, blocks), partial(ServerStub, node), terms, blocks)


@contextlib.asynccontextmanager
async def decoding(decoders: Sequence[Decoder]) -> AsyncIterator[None]:
    """All of them, each past its prompt."""
    async with asyncio.TaskGroup() as group:
        for decoder in decoders:
            group.create_task(decoder.run())
        for decoder in decoders:
            await decoder.has_begun.wait()
        try:
            yield
        finally:
            for decoder in decoders:
                decoder.is_over = True


BENCHMARK = Benchmark(
    "move",
    "a decode step of eight sessions on a server that moves: four on blocks that stay, four that leave",
    run,
    15.0,
)
