"""Where sessions of a test go, without a directory."""

from __future__ import annotations

from petalsd.client.routing import Hop
from petalsd.swarm.directory import RemoteSpan
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan


class OnlyTo:
    """Routes to one server of petalsd; a failure of it would be a replay, which is forbidden."""

    def __init__(self, peer: str, span: BlockSpan) -> None:
        record = ServerRecord(ServerState.ONLINE, 1.0, span, version="petalsd")
        self._server = RemoteSpan(peer, span, record)

    def route_session(self, blocks: BlockSpan, max_tokens: int) -> list[Hop]:
        return [Hop(self._server, blocks)]

    async def refresh(self) -> None:
        """There is nothing to read."""

    def is_far(self, peer: str) -> bool:
        return False

    def report_failure(self, peer: str) -> None:
        raise AssertionError(f"{peer} failed")

    def report_success(self, peer: str) -> None:
        """As it should be."""
