"""A node that serves no blocks and is always there: through it others join, find and reach each other.

It keeps its part of the directory, answers who can be dialled, and relays for those who cannot. It needs nobody:
other bootstrap nodes are dialled after the start, so that of several each may start first, and all of them may
have the same list of addresses, their own among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import structlog

from petalsd.errors import SwarmError
from petalsd.swarm.directory import READ_TIMEOUT_S, SwarmView, read_views
from petalsd.swarm.node import DHTEntry, Node, NodeOptions, peer_of
from petalsd.swarm.protocol import MODELS_KEY
from petalsd.swarm.reachability import ReachabilityService, is_reached_by_others
from petalsd.swarm.record import ModelRecord

log = structlog.get_logger(__name__)

_MAX_MODELS = 64
_MAX_BLOCKS = 4096  # of all models that are shown
_MAX_PREFIX = 256
_MAX_PINGS = 64
_REACHABILITY_S = 20.0
_ASK_AGAIN_S = 120.0


@dataclass(frozen=True, slots=True)
class BootstrapStats:
    """The figures of a moment.

    initial_peers  other bootstrap nodes in the configuration; known_initial: in the routing table
    known_peers    in the routing table of the DHT
    stored_keys    of the directory, kept here
    is_reachable   what peers said who dialled us; None where nobody could be asked
    """

    initial_peers: int = 0
    known_initial: int = 0
    known_peers: int = 0
    stored_keys: int = 0
    is_reachable: bool | None = None


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model that servers of the swarm have announced, and who serves it."""

    repository: str | None
    view: SwarmView


class BootstrapNode:
    """``options.initial_peers`` are the other bootstrap nodes. Start after stop makes it anew."""

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._node: Node | None = None
        self._reachability: ReachabilityService | None = None
        self._others: tuple[str, ...] = ()
        self._is_reachable: bool | None = None
        self._ask_again_s = -math.inf
        self.known_maddrs: tuple[str, ...] = ()

    @property
    def peer_id(self) -> str:
        return self._started.peer_id

    async def start(self) -> None:
        """SwarmError says why it cannot listen, ConfigError that the key is damaged; nobody else is needed."""
        node = Node(replace(self._options, initial_peers=(), is_dialable=True))
        await node.start()
        self._node, self._reachability = node, ReachabilityService(node)
        self._is_reachable, self._ask_again_s = None, -math.inf  # what was true of the node before
        try:
            self._others = tuple(
                maddr for maddr in self._options.initial_peers if peer_of(maddr) != node.peer_id
            )
            await self._reachability.start()
            await self.is_in_touch()
            maddrs = await self.maddrs()
        except BaseException:
            await self.stop()
            raise
        log.info("bootstrap_node_started", peer_id=node.peer_id, maddrs=maddrs)

    async def stop(self) -> None:
        """Idempotent."""
        node, self._node = self._node, None
        reachability, self._reachability = self._reachability, None
        self.known_maddrs = ()
        try:
            if reachability is not None:
                await reachability.stop()
        finally:
            if node is not None:
                await node.stop()

    async def until_failed(self) -> str:
        """Wait until the node is broken for good; the reason."""
        return await self._started.until_failed()

    async def maddrs(self) -> list[str]:
        """Addresses under which others reach us, asked of the libp2p daemon."""
        maddrs = await self._started.visible_maddrs()
        self.known_maddrs = tuple(maddrs)
        return maddrs

    async def is_in_touch(self) -> bool:
        """Whether any other bootstrap node is known, dialling those that are not; True where there is none."""
        num_known = await self._started.acquaint(self._others)
        if num_known:
            await self._ask_whether_reachable()
        return bool(num_known) or not self._others

    async def _ask_whether_reachable(self) -> None:
        """Until others say so once: a port that was closed may have been opened since."""
        if self._is_reachable or time.monotonic() < self._ask_again_s:
            return
        self._ask_again_s = time.monotonic() + _ASK_AGAIN_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REACHABILITY_S):
                self._is_reachable = await is_reached_by_others(self._started)

    async def renew(self) -> None:
        """Nothing is announced."""

    async def refresh(self) -> None:
        """Look for a key that nobody has: peers that do not answer leave the routing table, new ones enter it."""
        await self._started.get([f"petalsd.heartbeat.{secrets.token_hex(16)}"], READ_TIMEOUT_S)

    async def read_models(self) -> list[ModelView]:
        """What the swarm serves. SwarmError or DeadlineExceeded when the directory cannot be read."""
        found = await self._started.get([MODELS_KEY], READ_TIMEOUT_S)
        models = parse_models(found[MODELS_KEY])
        views = await read_views(self._started, {prefix: one.num_blocks for prefix, one in models.items()})
        return [ModelView(models[view.prefix].repository, view) for view in views]

    async def pings(self, peers: Collection[str]) -> Mapping[str, float]:
        """Round trips in seconds to some of the peers, ``inf`` for no answer."""
        asked = list(peers)[:_MAX_PINGS]
        return dict(zip(asked, await asyncio.gather(*map(self._started.ping, asked)), strict=True))

    def stats(self) -> BootstrapStats:
        node = self._node
        if node is None:
            return BootstrapStats(initial_peers=len({peer_of(maddr) for maddr in self._others}))
        known, initial = set(node.known_peers()), {peer_of(maddr) for maddr in self._others}
        return BootstrapStats(
            initial_peers=len(initial),
            known_initial=len(initial & known),
            known_peers=len(known),
            stored_keys=node.num_stored_keys,
            is_reachable=self._is_reachable,
        )

    @property
    def _started(self) -> Node:
        if self._node is None:
            raise SwarmError("this node has not started")
        return self._node


def parse_models(entries: Mapping[object, DHTEntry]) -> dict[str, ModelRecord]:
    """The usable entries under ``_petals.models`` by name, so many of the newest as can be looked up at once.

    Anyone may have written the others.
    """
    models: dict[str, ModelRecord] = {}
    num_blocks = 0
    for prefix, entry in sorted(entries.items(), key=lambda item: -item[1].expiration):
        try:
            if not isinstance(prefix, str) or not 0 < len(prefix) <= _MAX_PREFIX:
                raise ValueError("the subkey is not the name of a model")
            record = ModelRecord.from_wire(entry.value)
        except ValueError as error:  # one hostile entry must not hide the others
            log.debug("bad_model_record", prefix=repr(prefix)[:80], error=str(error)[:200])
            continue
        num_blocks += record.num_blocks
        if len(models) == _MAX_MODELS or num_blocks > _MAX_BLOCKS:
            break
        models[prefix] = record
    return dict(sorted(models.items()))
