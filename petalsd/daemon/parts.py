"""What the daemon asks of the parts that it brings to life. The real ones and the tests' fakes both fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from petalsd.daemon.presence import SwarmPresence
from petalsd.engine.handle import SessionInfo
from petalsd.engine.stats import EngineStats
from petalsd.errors import DeviceLost
from petalsd.kvcache.pool import KVPool
from petalsd.swarm.announcer import Announcement, Part
from petalsd.swarm.directory import SwarmView
from petalsd.swarm.escrow import NOTHING, Amount
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan


@dataclass(frozen=True, slots=True)
class MemberStats:
    """The figures of a moment.

    is_member     whether we have joined
    known_peers   in the routing table of the DHT
    stored_keys   of the swarm's directory, that our node keeps for everybody
    open_streams  calls of others that are streams
    held_bytes    of large messages that are being received or computed on
    announcement  what was last stored since we joined
    num_ghosts    servers in the directory that are thought to have gone
    awaited       sessions that other servers handed to us and whose clients have not come yet
    """

    is_member: bool = False
    known_peers: int = 0
    stored_keys: int = 0
    open_streams: int = 0
    held_bytes: int = 0
    announcement: Announcement | None = None
    num_ghosts: int = 0
    awaited: Amount = NOTHING


class ServingEngine(Protocol):
    """The part of ``engine.Engine`` that the daemon uses."""

    @property
    def span(self) -> BlockSpan | None: ...

    @property
    def pool(self) -> KVPool | None: ...

    @property
    def device_loss(self) -> DeviceLost | None: ...

    async def until_lost(self) -> NoReturn: ...

    async def start(self) -> None: ...

    async def stop(self, deadline_s: float) -> None: ...

    def restrict(self, kept: BlockSpan | None, reason: str) -> None: ...

    def lift_restriction(self) -> None: ...

    def work_outside(self, kept: BlockSpan | None) -> int: ...

    async def drop_span(self, reason: str) -> None: ...

    def end_work(self, reason: str, keeping: BlockSpan | None = None) -> None: ...

    async def self_test(self) -> None: ...

    async def probe(self) -> None: ...

    def stats(self) -> EngineStats: ...

    def open_sessions(self) -> list[SessionInfo]: ...


class SwarmMember(SwarmPresence, Protocol):
    """Our presence as a server: node, handlers and announcements as one thing.

    Requests are refused until ``admit``.
    """

    @property
    def is_relayed(self) -> bool:
        """Whether others reach us through relays only."""

    @property
    def known_maddrs(self) -> tuple[str, ...]:
        """What ``maddrs`` last said; empty while we are no member."""

    def pings(self) -> dict[str, float]:
        """Round trips in seconds to the servers that were pinged lately, ``inf`` for no answer."""

    async def announce(self, state: ServerState, span: BlockSpan) -> None:
        """Returns when the records of all blocks of ``span`` are stored. SwarmError or DeadlineExceeded."""

    async def announce_parts(self, parts: Sequence[Part], goal: BlockSpan | None = None) -> None:
        """The same for several spans, what is served last; blocks in none of them go OFFLINE first.

        JOINING ones are on the way to being served with all of ``goal``.
        """

    def admit(self) -> None:
        """Answer requests."""

    def refuse(self, reason: str) -> None:
        """Answer new sessions and requests with Draining(reason); running sessions go on."""

    async def hand_over(self, kept: BlockSpan | None, deadline_s: float) -> int:
        """Have sessions that use other blocks than ``kept`` (None: all) go on at other servers; how many do.

        The others stay as they are. SwarmError or DeadlineExceeded when the directory cannot be read.
        """

    async def read_view(self) -> SwarmView:
        """What the directory says now, with the ghosts that are known. SwarmError or DeadlineExceeded."""

    async def read_live_view(self) -> SwarmView:
        """Who serves what now, ghosts left out: takes pings, so some seconds. Errors as above."""

    def stats(self) -> MemberStats: ...
