"""What a bootstrap node answers: as every daemon, and why it cannot do what servers do."""

from __future__ import annotations

from aiohttp import web

from petalsd.control.operations import Operations
from petalsd.control.routes import Route
from petalsd.errors import Conflict

_OF_SERVERS = (
    ("GET", "/v1/sessions"),
    ("POST", "/v1/drain"),
    ("POST", "/v1/resume"),
    ("POST", "/v1/rebalance"),
)


class BootstrapOperations(Operations):
    """No path is missing that a server has: whoever asks is told what this daemon is."""

    def routes(self) -> dict[tuple[str, str], Route]:
        return super().routes() | {path: Route(_refuse) for path in _OF_SERVERS}


async def _refuse(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
    raise Conflict(
        f"{request.path}: this is a bootstrap node, which serves no blocks and has no sessions",
        hint="name a server of the swarm: petalsctl -i NAME",
    )
