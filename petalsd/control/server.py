"""Listens: on the control socket, and for metrics on a network address if one is configured."""

from __future__ import annotations

import asyncio

import structlog

from petalsd.control.access import Access
from petalsd.control.connection import ConnectionLimits, Server
from petalsd.control.listening import listen
from petalsd.control.operations import Operations
from petalsd.control.routes import Router
from petalsd.control.socket_file import SocketFile
from petalsd.types import HostPort

log = structlog.get_logger(__name__)

_STOP_TIMEOUT_S = 2.0


class ControlServer:
    """``start`` serves ``operations`` on ``socket_file``, and what is public of them on ``metrics_address`` unless
    that is None.
    """

    def __init__(
        self,
        operations: Operations,
        socket_file: SocketFile,
        access: Access,
        metrics_address: HostPort | None,
    ) -> None:
        self._operations = operations
        self._socket_file = socket_file
        self._access = access
        self._metrics_address = metrics_address
        self._listening: list[tuple[asyncio.Server, Server]] = []
        self.metrics_addresses: list[HostPort] = []

    async def start(self) -> None:
        """Conflict when another daemon listens there, AddressUnavailable when an address cannot be had now,
        ConfigError when it never can.
        """
        try:
            await self._listen_for_control()
            if self._metrics_address is not None:
                await self._listen_for_metrics(self._metrics_address)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Take no more connections, cut off those that do not end soon, remove the file. Idempotent."""
        listening, self._listening = self._listening, []
        for listener, _ in listening:
            listener.close()
        self._socket_file.close()
        await asyncio.gather(*(server.shutdown(_STOP_TIMEOUT_S) for _, server in listening))
        self.metrics_addresses = []

    async def _listen_for_control(self) -> None:
        loop = asyncio.get_running_loop()
        router = Router(self._operations.routes(), self._access)
        server = Server(router.handle, ConnectionLimits(self._access.may_act))
        listener = await loop.create_unix_server(server, sock=self._socket_file.open())
        self._listening.append((listener, server))
        log.info("control_socket_open", path=str(self._socket_file.path), acting=self._access.actors)

    async def _listen_for_metrics(self, address: HostPort) -> None:
        router = Router(self._operations.public_routes(), None)
        server = Server(router.handle, ConnectionLimits(lambda peer: False))
        listener, self.metrics_addresses = await listen(server, address, "metrics.listen")
        self._listening.append((listener, server))
        log.info("metrics_open", addresses=[str(one) for one in self.metrics_addresses])
