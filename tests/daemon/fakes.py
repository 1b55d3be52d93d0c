"""A swarm that is a dictionary, an engine that computes nothing, and a daemon made of them."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from petalsd.config import Config
from petalsd.config_loading import load_config
from petalsd.daemon.activity import Activity
from petalsd.daemon.announcement import VERSION
from petalsd.daemon.backoff import Backoff
from petalsd.daemon.components import Parts
from petalsd.daemon.daemon import Daemon
from petalsd.daemon.parts import MemberStats
from petalsd.daemon.placement_record import PlacementRecord
from petalsd.daemon.plan import Demand
from petalsd.daemon.rebalancer import Rebalancer
from petalsd.daemon.reloading import Reloader
from petalsd.daemon.service import Service
from petalsd.daemon.settings import Settings
from petalsd.daemon.signals import Signals
from petalsd.daemon.sizing import MemoryNeed
from petalsd.daemon.span_limit import SpanLimit
from petalsd.daemon.span_loader import SpanLoader
from petalsd.daemon.speed import Rates
from petalsd.daemon.supervisor import Supervisor
from petalsd.daemon.warnings import WarningBoard
from petalsd.engine.handle import SessionInfo
from petalsd.engine.stats import EngineStats
from petalsd.engine.step import SessionSpec
from petalsd.errors import ConfigError, DeviceLost, SwarmError
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.prefixes import PrefixCache
from petalsd.metrics import Metrics
from petalsd.models.ladder import Choice
from petalsd.swarm.announcer import Announcement, Part
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.systemd import Notifier
from petalsd.types import BlockSpan, DaemonState

NUM_BLOCKS = 8
PEER = "Qm" + "a" * 44
OTHER = "Qm" + "b" * 44
GATE_S = 20.0
QUICK = Backoff(attempts=3, first_delay_s=0.0, max_delay_s=0.0)


class FakeSwarm:
    """The directory: per block, peer to record. ``records`` has what peers say beside what is put."""

    def __init__(self) -> None:
        self.records: dict[str, ServerRecord] = {}
        self.blocks: list[dict[str, ServerRecord]] = [{} for _ in range(NUM_BLOCKS)]
        self.ghosts: set[str] = set()

    def put(self, peer: str, state: ServerState, span: BlockSpan, throughput: float = 1.0) -> None:
        plain = ServerRecord(state, throughput, version=VERSION)
        record = replace(self.records.get(peer, plain), state=state, throughput=throughput, span=span)
        for block in span:
            self.blocks[block][peer] = record

    def states_of(self, peer: str) -> dict[int, ServerState]:
        return {index: records[peer].state for index, records in enumerate(self.blocks) if peer in records}


@dataclass
class FakeMember:
    """Records what it is asked for in ``calls``; ``failures`` are raised by the calls of that name."""

    swarm: FakeSwarm
    calls: list[str]
    peer_id: str = PEER
    throughput: float = 1.0
    failures: dict[str, list[Exception]] = field(default_factory=dict)
    is_swarm_there: bool = True
    is_relayed: bool = False
    announcement: Announcement | None = None
    handed_over: list[BlockSpan | None] = field(default_factory=list)
    broken: asyncio.Event = field(default_factory=asyncio.Event)

    def _call(self, name: str, detail: str = "") -> None:
        self.calls.append(f"{name} {detail}".strip())
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    async def start(self) -> None:
        self._call("join")
        self.broken = asyncio.Event()

    async def stop(self) -> None:
        self._call("part")

    async def until_failed(self) -> str:
        await self.broken.wait()
        return "p2pd died"

    @property
    def known_maddrs(self) -> tuple[str, ...]:
        return (f"/ip4/127.0.0.1/tcp/1/p2p/{self.peer_id}",)

    def pings(self) -> dict[str, float]:
        return {OTHER: 0.0234}

    def stats(self) -> MemberStats:
        return MemberStats(is_member=True, known_peers=1, announcement=self.announcement)

    async def maddrs(self) -> list[str]:
        return [f"/ip4/127.0.0.1/tcp/1/p2p/{self.peer_id}"]

    async def announce(self, state: ServerState, span: BlockSpan) -> None:
        await self.announce_parts([(state, span)])

    async def announce_parts(self, parts: Sequence[Part], goal: BlockSpan | None = None) -> None:
        self._call("announce", ", ".join(f"{state.name} {span}" for state, span in parts))
        if self.broken.is_set():
            raise SwarmError("p2pd died")
        for block, state in self.swarm.states_of(self.peer_id).items():
            if state is not ServerState.OFFLINE:
                self.swarm.put(self.peer_id, ServerState.OFFLINE, BlockSpan(block, block + 1))
        for state, span in parts:
            self.swarm.put(self.peer_id, state, span, self.throughput)
        self.announcement = Announcement(state, time.monotonic())

    async def renew(self) -> None:
        self._call("renew")

    def admit(self) -> None:
        self._call("admit")

    def refuse(self, reason: str) -> None:
        self._call("refuse")

    async def is_in_touch(self) -> bool:
        self._call("look around")
        return self.is_swarm_there

    async def read_live_view(self) -> SwarmView:
        return (await self.read_view()).without_ghosts()

    async def hand_over(self, kept: BlockSpan | None, deadline_s: float) -> int:
        self.handed_over.append(kept)
        if self.failures.get("hand_over"):
            raise self.failures["hand_over"].pop(0)
        return 0

    async def read_view(self) -> SwarmView:
        if self.failures.get("read_view"):
            raise self.failures["read_view"].pop(0)
        blocks = [dict(records) for records in self.swarm.blocks]
        return SwarmView("prefix", NUM_BLOCKS, blocks, frozenset(self.swarm.ghosts))


@dataclass
class FakeEngine:
    """``sessions`` is how many are open; ``busy_since_s`` and ``last_step_s`` as in EngineStats."""

    calls: list[str]
    sessions: int = 0
    busy_since_s: float | None = None
    failures: list[Exception] = field(default_factory=list)
    load_failures: list[Exception] = field(default_factory=list)
    pool: KVPool | None = None
    span: BlockSpan | None = None
    open_spans: list[BlockSpan] = field(default_factory=list)
    iterations: int = 0
    busy_tokens: int = 0
    slowest_token_s: float = 0.0
    last_step_s: float = 0.0
    device_loss: DeviceLost | None = None
    is_lost: asyncio.Event = field(default_factory=asyncio.Event)

    def lose_device(self) -> None:
        self.device_loss = DeviceLost(
            "cudaErrorIllegalAddress", 700, "an illegal memory access was encountered"
        )
        self.is_lost.set()

    async def until_lost(self) -> NoReturn:
        await self.is_lost.wait()
        assert self.device_loss is not None
        raise self.device_loss

    async def start(self) -> None:
        self.calls.append("engine starts")

    async def stop(self, deadline_s: float) -> None:
        self.calls.append("engine stops")
        self.busy_since_s = None

    async def load_span(self, blocks: Mapping[int, Any], pool: Any, rope: Any) -> None:
        self.calls.append("engine loads")
        if self.load_failures:
            raise self.load_failures.pop(0)
        self.span = BlockSpan(min(blocks), max(blocks) + 1)

    async def change_span(self, blocks: Mapping[int, Any]) -> None:
        self.span = BlockSpan(min(blocks), max(blocks) + 1)
        self.calls.append(f"engine changes to {self.span}")

    def restrict(self, kept: BlockSpan | None, reason: str) -> None:
        self.calls.append(f"engine keeps {kept}")

    def lift_restriction(self) -> None:
        self.calls.append("engine keeps all")

    def work_outside(self, kept: BlockSpan | None) -> int:
        return self.sessions + sum(kept is None or not kept.covers(span) for span in self.open_spans)

    async def drop_span(self, reason: str) -> None:
        self.calls.append("engine drops")
        self.sessions, self.span, self.open_spans = 0, None, []

    def end_work(self, reason: str, keeping: BlockSpan | None = None) -> None:
        self.calls.append(f"sessions end: {reason}")
        self.sessions = 0
        self.open_spans = [span for span in self.open_spans if keeping is not None and keeping.covers(span)]

    async def self_test(self) -> None:
        self.calls.append("self-test")
        if self.failures:
            raise self.failures.pop(0)

    async def probe(self) -> None:
        await self.self_test()

    def open_sessions(self) -> list[SessionInfo]:
        return [
            SessionInfo(key, SessionSpec(span, 1, 64, OTHER), 0, 0.0, 0.0, 0)
            for key, span in enumerate(self.open_spans)
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            sessions=self.work_outside(None), rows=self.sessions, queued_passes=0, steps_total=0, tokens_total=0,
            iterations_total=self.iterations, last_step_monotonic_s=self.last_step_s,
            busy_since_monotonic_s=self.busy_since_s, busy_tokens=self.busy_tokens,
            slowest_token_s=self.slowest_token_s,
        )  # fmt: skip


@dataclass
class FakeReader:
    calls: list[str]
    failures: list[Exception] = field(default_factory=list)
    failing_blocks: dict[int, Exception] = field(default_factory=dict)
    gates: dict[int, threading.Event] = field(default_factory=dict)

    def keep_only(self, blocks: Sequence[int]) -> None:
        """Nothing is on a disk."""

    def fetch(self, span: BlockSpan, progress: Callable[[str, int, int], None]) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def load_block(self, index: int) -> Any:
        if index in self.gates:
            self.gates[index].wait(GATE_S)
        self.calls.append(f"load {index}")
        if index in self.failing_blocks:
            raise self.failing_blocks[index]
        return object()


class Stage:
    """A daemon of fakes, with everything at hand that a test looks at or breaks."""

    def __init__(self, *overrides: str) -> None:
        self.calls: list[str] = []
        self.swarm = FakeSwarm()
        self.member = FakeMember(self.swarm, self.calls)
        self.engine = FakeEngine(self.calls)
        self.reader = FakeReader(self.calls)
        self.choices: list[Choice] = []
        self.rates = Rates(throughput=1.0)
        self.has_room, self.max_blocks, self.stretched_blocks = True, 4, 5
        self.planned_blocks: list[int] = []  # what caches were made for
        self.signals = Signals()
        self.overrides = ["model.source=m", "blocks.join_delay_s=0", *overrides]
        self.settings = Settings(self._read(), self._read, self._demand)
        self.board = WarningBoard()
        self.metrics = Metrics()
        self.available_bytes = NUM_BLOCKS
        self.limit = SpanLimit(MemoryNeed(1, 0), lambda: self.available_bytes, self.board)
        rng = random.Random(0)
        self.placement = PlacementRecord(self.metrics)
        rebalancer = Rebalancer(self.member, rng, lambda num_blocks: 1.0, lambda: None, self.placement)
        self.supervisor = Supervisor(
            self.engine, self.member, rebalancer, lambda: self.settings.config.blocks, self.demand, rng,
            self.board,
        )  # fmt: skip
        self.daemon = Daemon(
            Parts(
                instance="demo",
                engine=self.engine,
                prefixes=PrefixCache(0),
                member=self.member,
                loader=SpanLoader(
                    self.reader, lambda: lambda progress: None, self.board, self.metrics, QUICK
                ),
                rebalancer=rebalancer,
                supervisor=self.supervisor,
                settings=self.settings,
                prepare=self._prepare,
                install=self._install,
                exchange=self.engine.change_span,
                has_pages=lambda num_blocks: (
                    num_blocks <= (self.stretched_blocks if self.engine.open_spans else self.max_blocks)
                ),
                has_room=lambda num_blocks: self.has_room,
                demand=self.demand,
                limit=self.limit,
                rates=lambda: self.rates,
                choices=lambda: self.choices,
                board=self.board,
                metrics=self.metrics,
                activity=Activity(),
            ),
            self.signals,
            QUICK,
        )
        service = Service(Notifier(), lambda: "")
        self.reloader = Reloader(self.settings, self.supervisor.check_now, service, self.board)
        self._seen: list[tuple[DaemonState, asyncio.Future[None]]] = []
        self.daemon.lifecycle.subscribe(self._on_move)

    async def run(self) -> None:
        """The daemon's life, with reloads on the signal beside it."""
        reloading = asyncio.create_task(self.reloader.run(self.signals.reload))
        try:
            await self.daemon.run()
        finally:
            reloading.cancel()

    def demand(self) -> Demand:
        return self._demand(self.settings.config)

    def until(self, state: DaemonState) -> asyncio.Future[None]:
        """Resolves when the daemon next moves to ``state``."""
        future = asyncio.get_running_loop().create_future()
        self._seen.append((state, future))
        return future

    def _on_move(self, old: DaemonState, new: DaemonState) -> None:
        for state, future in self._seen:
            if state is new and not future.done():
                future.set_result(None)

    def _read(self) -> Config:
        return load_config(None, {}, self.overrides).config

    def _demand(self, config: Config) -> Demand:
        blocks, most = config.blocks, self.limit.most or NUM_BLOCKS
        if blocks.span is not None:
            if blocks.span.end > NUM_BLOCKS:
                raise ConfigError(f"blocks.span = {blocks.span}: outside the model")
            span = blocks.span.first(most)
            return Demand(len(span), span)
        if blocks.count == "auto":
            return Demand(min(most, 4), None, may_be_fewer=True)
        return Demand(min(most, blocks.count), None)

    async def _prepare(self) -> None:
        self.calls.append("prepare")

    async def _install(self, blocks: Mapping[int, Any], num_planned: int) -> None:
        self.planned_blocks.append(num_planned)
        await self.engine.load_span(blocks, None, None)
