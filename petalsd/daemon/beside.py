"""What goes on beside a daemon's main work, started and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import structlog

from petalsd.control.server import ControlServer

log = structlog.get_logger(__name__)


Works = Mapping[str, Callable[[], Awaitable[None]]]


@contextlib.asynccontextmanager
async def beside(control: ControlServer, works: Works) -> AsyncIterator[None]:
    """Within this block the control socket answers and all ``works`` go on, by name.

    As ``ControlServer.start`` when the socket or the metrics' address cannot be had.
    """
    await control.start()
    tasks = [asyncio.create_task(_lasting(name, work), name=name) for name, work in works.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await control.stop()


async def _lasting(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """A bug in one of them must be seen, and must not end the serving."""
    try:
        await work()
    except Exception:
        log.exception("attendant_failed", name=name)
