"""The client's parts put together: a node that only dials, the directory, sessions and passes of one model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType

import structlog

from petalsd.client.options import ClientOptions
from petalsd.client.passes import SwarmPasses
from petalsd.client.sequence import SequenceManager
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.errors import RemoteFailure, SwarmError
from petalsd.swarm.directory import SwarmView, read_view
from petalsd.swarm.node import Node, NodeOptions
from petalsd.swarm.stub import ServerStub

log = structlog.get_logger(__name__)


class SwarmClient:
    """Our way into the swarm of one model. Start it, use it and stop it in one loop.

    prefix         the model's DHT prefix
    num_blocks     all blocks of the model
    initial_peers  multiaddrs of any members of the swarm
    whole_from     see ``history.StepLog``
    """

    def __init__(
        self,
        prefix: str,
        num_blocks: int,
        initial_peers: Sequence[str],
        options: ClientOptions | None = None,
        whole_from: int | None = None,
    ) -> None:
        self.prefix = prefix
        self.whole_from = whole_from
        self.options = options or ClientOptions()
        self._node_options = NodeOptions(
            initial_peers=tuple(initial_peers), client_mode=True, identity_path=self.options.identity_path
        )
        self.node = Node(self._node_options)
        self.manager = SequenceManager(self._read_view, self._ping, prefix, num_blocks, self.options)
        self._tending: asyncio.Task[None] | None = None
        self.passes = SwarmPasses(self.manager, self.connect, prefix, self.manager.blocks, self.options)

    async def start(self) -> None:
        """Join the swarm and learn who serves what; SwarmError when no initial peer answers."""
        try:
            await self.node.start()
            await self.manager.start()
        except BaseException:
            await self.stop()
            raise
        self._tending = asyncio.create_task(self._tend_node(), name="petalsd-client-node")

    async def stop(self) -> None:
        """Leave; idempotent. Close the sessions first."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
            self._tending = None
        await self.manager.stop()
        await self.node.stop()

    def session(self, max_tokens: int) -> InferenceSession:
        """A session whose rows may reach ``max_tokens`` positions; close it after use."""
        terms = StreamTerms(self.prefix, max_tokens, self.options, self.whole_from)
        return InferenceSession(self.manager, self.connect, terms, self.manager.blocks)

    def connect(self, peer: str) -> ServerStub:
        """The calls to one server."""
        try:
            return ServerStub(self.node, peer)
        except ValueError as error:  # anybody can write a record under any name
            raise RemoteFailure(peer, "not a PeerID") from error

    async def __aenter__(self) -> SwarmClient:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _tend_node(self) -> None:
        """Start the node anew whenever it breaks; calls fail until it is back, and are retried as ever."""
        pause_s = self.options.min_backoff_s
        while True:
            reason = await self.node.until_failed()
            log.warning("node_failed", reason=reason)
            await self.node.stop()
            self.node = Node(self._node_options)
            try:
                await self.node.start()
            except SwarmError as error:
                log.warning("node_not_restarted", error=str(error), retry_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self.options.max_backoff_s)
            else:
                pause_s = self.options.min_backoff_s

    async def _read_view(self) -> SwarmView:
        return await read_view(
            self.node, self.prefix, len(self.manager.blocks), self.options.refresh_timeout_s
        )

    async def _ping(self, peer: str) -> float:
        return await self.node.ping(peer, self.options.ping_timeout_s)
