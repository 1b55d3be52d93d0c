"""Places that are a while away from each other and from us, on one machine: proxies that hold all bytes back.

    with Distance(0.02) as distance:
        place = distance.place()  # listen at place.host_maddr, announce place.announce_maddr

Who dials a place gets each byte that much later, and so does the place what it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from petalsd.client.runtime import ClientRuntime

_READ_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Place:
    host_maddr: str
    announce_maddr: str


class Distance:
    """Delays bytes by ``one_way_s`` in each direction, on a loop of its own, until the context is left."""

    def __init__(self, one_way_s: float) -> None:
        self._one_way_s = one_way_s
        self._runtime = ClientRuntime()
        self._proxies: list[asyncio.Server] = []
        self._relays: set[asyncio.Task[None]] = set()

    def place(self) -> Place:
        """Another one; a server can listen there once."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return Place(_maddr(port), _maddr(self._runtime.run(self._listen(port))))

    def __enter__(self) -> Distance:
        self._runtime.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runtime.run(self._close())
        self._runtime.stop()

    async def _close(self) -> None:
        for proxy in self._proxies:
            proxy.close()
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    async def _listen(self, target: int) -> int:
        proxy = await asyncio.start_server(partial(self._relay, target), "127.0.0.1", 0)
        self._proxies.append(proxy)
        return int(proxy.sockets[0].getsockname()[1])

    async def _relay(self, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to the server behind ``target``, and back."""
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            async with _closing(writer):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
                async with _closing(far_writer), asyncio.TaskGroup() as group:
                    group.create_task(self._carry(reader, far_writer))
                    group.create_task(self._carry(far_reader, writer))
        except OSError:  # nobody listens there (any more)
            pass
        finally:
            self._relays.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while (due := await under_way.get())[1]:
                await asyncio.sleep(max(0.0, due[0] - loop.time()))
                writer.write(due[1])
            writer.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            data = b"..."
            while data:
                try:
                    data = await reader.read(_READ_BYTES)
                except OSError:
                    data = b""
                under_way.put_nowait((loop.time() + self._one_way_s, data))


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _maddr(port: int) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}"
