"""Our membership in the swarm: node, handlers and announcements, joined, healed and left as one thing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from petalsd.daemon.parts import MemberStats
from petalsd.errors import SwarmError
from petalsd.swarm.announcer import Announcer, AnnouncerOptions, Part
from petalsd.swarm.directory import SwarmView, read_view
from petalsd.swarm.ghosts import GhostFinder
from petalsd.swarm.handler import TransformerConnectionHandler
from petalsd.swarm.node import RELAYED, Node, NodeOptions, peer_of
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.reachability import Outlook, ReachabilityService, look_around
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.serving import Serving
from petalsd.swarm.witnesses import Witnesses
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_LOADING = "this server is loading its blocks"
_GHOST_PING_S = 3.0  # the placement waits for it
_RELAY_S, _RELAY_POLL_S = 6.0, 0.2  # one that relays takes a second or two
_RELAY_LOST_S = 20.0  # libp2p asks one that refused or went again after an hour
_STALE_S = 1.0  # others may have announced a move meanwhile

# The record of a state and span as things are now; told whether others reach us through relays only.
Describe = Callable[[ServerState, BlockSpan, bool], ServerRecord]


@dataclass(slots=True)
class _Connection:
    """What lives and dies with one libp2p daemon."""

    node: Node
    handler: TransformerConnectionHandler
    announcer: Announcer
    ghosts: GhostFinder
    reachability: ReachabilityService | None

    async def open(self) -> None:
        await self.handler.start()
        if self.reachability is not None:
            await self.reachability.start()
        self.announcer.start()

    async def close(self) -> None:
        """From the outside in: no more announcements, requests, node; also when it is cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.node.stop)
            if self.reachability is not None:
                stack.push_async_callback(self.reachability.stop)
            stack.push_async_callback(self.handler.stop, "the server is stopping")
            stack.push_async_callback(self.announcer.stop)


class Membership:
    """``parts.SwarmMember`` over the real swarm; start after stop makes all of it anew under the same identity."""

    def __init__(
        self, options: NodeOptions, announcing: AnnouncerOptions, serving: Serving, describe: Describe
    ) -> None:
        self._options = options
        self._announcing = announcing
        self._serving = serving
        self._describe = describe
        self._connection: _Connection | None = None
        self.is_relayed = False
        self._reached_s = 0.0
        self.known_maddrs: tuple[str, ...] = ()

    @property
    def peer_id(self) -> str:
        return self._joined.node.peer_id

    async def start(self) -> None:
        """Join, refusing requests until ``admit``. SwarmError says why it cannot."""
        self._serving.refuse(_LOADING)
        outlook = await _outlook(self._options)
        self.is_relayed = outlook.is_dialable is False
        options = replace(self._options, client_mode=self.is_relayed, is_dialable=outlook.is_dialable)
        if self.is_relayed:
            node = await _relayed_node(options, outlook.relays)
        else:
            node = Node(options)
            await node.start()
        self._reached_s = time.monotonic()
        self._connection = _Connection(
            node=node,
            handler=TransformerConnectionHandler(node, self._serving),
            announcer=Announcer(node, self._announcing, self._make_record, self._serving.observer),
            ghosts=_ghost_finder(node),
            reachability=None if self.is_relayed else ReachabilityService(node),
        )
        try:
            await self._connection.open()
        except BaseException:
            await self.stop()
            raise
        log.info("joined", peer_id=node.peer_id, maddrs=await self.maddrs(), relayed=self.is_relayed)

    async def stop(self) -> None:
        """Leave; idempotent."""
        connection, self._connection = self._connection, None
        self.known_maddrs = ()
        if connection is not None:
            await connection.close()

    async def until_failed(self) -> str:
        return await self._joined.node.until_failed()

    async def maddrs(self) -> list[str]:
        """SwarmError also when no relay has had us for so long that others may be lost without a word."""
        maddrs = await self._joined.node.visible_maddrs()
        self.known_maddrs = tuple(maddrs)
        if not self.is_relayed or _is_relayed(maddrs):
            self._reached_s = time.monotonic()
        elif time.monotonic() > self._reached_s + _RELAY_LOST_S:
            raise SwarmError(f"no peer relays for this server any more, for {_RELAY_LOST_S:g} s")
        return maddrs

    def pings(self) -> dict[str, float]:
        return {} if self._connection is None else self._connection.announcer.pings()

    async def announce(self, state: ServerState, span: BlockSpan) -> None:
        await self._joined.announcer.announce(state, span)

    async def renew(self) -> None:
        await self._joined.announcer.renew()

    async def announce_parts(self, parts: Sequence[Part], goal: BlockSpan | None = None) -> None:
        await self._joined.announcer.announce_parts(parts, goal)

    def admit(self) -> None:
        self._serving.serve()

    def refuse(self, reason: str) -> None:
        self._serving.refuse(reason)

    async def hand_over(self, kept: BlockSpan | None, deadline_s: float) -> int:
        view = await self.read_view()
        return await self._joined.handler.hand_over(view, kept, deadline_s)

    async def read_view(self) -> SwarmView:
        joined = self._joined
        view = await read_view(joined.node, self._announcing.prefix, self._announcing.num_blocks)
        return replace(view, ghosts=joined.ghosts.known)

    async def read_live_view(self) -> SwarmView:
        """Seconds go by where somebody is silent: the directory is read once more after that."""
        ghosts, view = self._joined.ghosts, await self.read_view()
        began_s = time.monotonic()
        view = replace(view, ghosts=await ghosts.search(view))
        if time.monotonic() - began_s > _STALE_S:
            view = await self.read_view()
        return view.without_ghosts()

    def stats(self) -> MemberStats:
        connection = self._connection
        if connection is None:
            return MemberStats()
        return MemberStats(
            is_member=True,
            known_peers=len(connection.node.known_peers()),
            stored_keys=connection.node.num_stored_keys,
            open_streams=connection.handler.num_streams,
            held_bytes=connection.node.budget.held_bytes,
            announcement=connection.announcer.last_stored,
            num_ghosts=len(connection.ghosts.known),
            awaited=connection.handler.awaited,
        )

    async def is_in_touch(self) -> bool:
        return await self._joined.node.is_in_touch()

    @property
    def _joined(self) -> _Connection:
        if self._connection is None:
            raise SwarmError("this server has not joined a swarm")
        return self._connection

    def _make_record(self, state: ServerState, span: BlockSpan) -> ServerRecord:
        return self._describe(state, span, self.is_relayed)


def _ghost_finder(node: Node) -> GhostFinder:
    return GhostFinder(
        lambda peer: node.ping(peer, _GHOST_PING_S),
        node.peer_id,
        node.is_in_touch,
        testify=Witnesses(node).testify,
    )


async def _outlook(options: NodeOptions) -> Outlook:
    """As the swarm sees it. Who starts a swarm must be dialable; on this machine alone there is no question."""
    if not options.initial_peers:
        return Outlook(is_dialable=True)
    return await look_around(options) if options.use_auto_relay else Outlook(is_dialable=None)


async def _relayed_node(options: NodeOptions, relays: Sequence[Sequence[str]]) -> Node:
    """A started node that one of the peers relays for: nobody could reach what another one announced.

    SwarmError where none does. They are tried one by one, for libp2p waits for all that it is told of.
    """
    for maddrs in relays:
        node = Node(replace(options, relays=tuple(maddrs)))
        try:
            await node.start()
            async with asyncio.timeout(_RELAY_S):
                while not _is_relayed(await node.visible_maddrs()):  # noqa: ASYNC110  # no event says so
                    await asyncio.sleep(_RELAY_POLL_S)
            return node
        except TimeoutError:
            log.info("not_relayed", relay=peer_of(maddrs[0]))
            await node.stop()
        except BaseException:
            await node.stop()
            raise
    raise SwarmError(
        f"others cannot dial this server, and none of {len(relays)} peers took it as a relay",
        hint="have the router forward its port (docs/configure.md), or join through a bootstrap node",
    )


def _is_relayed(maddrs: Sequence[str]) -> bool:
    return any(RELAYED in maddr for maddr in maddrs)
