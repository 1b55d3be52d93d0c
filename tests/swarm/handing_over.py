"""Two servers of the same blocks and a client, all known to the directory: what sessions go between."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from petalsd.client.options import ClientOptions
from petalsd.client.routing import Hop
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.swarm.announcer import Announcer, AnnouncerOptions
from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.swarm.stub import ServerStub
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel
from tests.swarm.servers import PREFIX, Server, joining, node, server
from tests.swarm.test_observer import Notes

SPAN = BlockSpan(1, 4)
RECORD = ServerRecord(ServerState.ONLINE, 1.0, BlockSpan(0, 4), version="petalsd test")
KV_TOKENS = 256


@dataclass
class Swarm:
    """``notes``: what the second server told its observer."""

    first: Server
    second: Server
    client: Node
    notes: Notes

    def view(self, *peers: str) -> SwarmView:
        """A directory in which these peers, or both servers, serve everything."""
        records = dict.fromkeys(peers or (self.first.node.peer_id, self.second.node.peer_id), RECORD)
        return SwarmView(PREFIX, 4, [records] * 4)

    def session(self, max_tokens: int = 64) -> InferenceSession:
        terms = StreamTerms(PREFIX, max_tokens, ClientOptions(min_backoff_s=0.01))
        return InferenceSession(Route(self), partial(ServerStub, self.client), terms, SPAN)

    async def idle(self) -> None:
        await self.first.idle()
        await self.second.idle()

    @property
    def expected(self) -> TinyModel:
        return self.first.model


class Route:
    """Leads to the server that has failed less often, the first one at first."""

    def __init__(self, swarm: Swarm) -> None:
        self._peers = [swarm.first.node.peer_id, swarm.second.node.peer_id]
        self.failures: list[str] = []

    def route_session(self, blocks: BlockSpan, max_tokens: int) -> list[Hop]:
        peer = min(self._peers, key=self.failures.count)
        return [Hop(RemoteSpan(peer, BlockSpan(0, 4), RECORD), blocks)]

    async def refresh(self) -> None:
        """There is nothing to read."""

    def is_far(self, peer: str) -> bool:
        return False

    def report_failure(self, peer: str) -> None:
        self.failures.append(peer)

    def report_success(self, peer: str) -> None:
        """Nothing is forgiven."""


@contextlib.asynccontextmanager
async def two_servers(path: Path) -> AsyncIterator[Swarm]:
    """Of all four blocks, with 64 pages of 16 tokens, of which a peer may hold 48 at the second one. The client is
    announced too, as a server of ``SPAN``, so that it may play the giver.
    """
    model, notes = TinyModel(path), Notes()
    async with (
        node() as first,
        node(await joining(first)) as second,
        node(await joining(first, client_mode=True)) as client,
        server(first, path, model=model, kv_tokens=KV_TOKENS) as one,
        server(second, path, model=model, kv_tokens=KV_TOKENS, observer=notes, max_peer_share=0.75) as two,
    ):
        for announced, span in ((first, one.span), (second, two.span), (client, SPAN)):
            await _announce(announced, span)
        yield Swarm(one, two, client, notes)


async def _announce(own: Node, span: BlockSpan) -> None:
    announcer = Announcer(
        own, AnnouncerOptions(PREFIX, 4), lambda state, span: replace(RECORD, state=state, span=span)
    )
    await announcer.announce(ServerState.ONLINE, span)
