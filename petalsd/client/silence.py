"""Servers that fall silent: an answer may take its time for as long as the server answers pings meanwhile.

One whose process hangs keeps its connection open, and one whose machine lost its power does until libp2p notices.
They would be waited for until the deadline of the answer, which is made for the slowest prefill of a busy server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from petalsd.client.options import ClientOptions
from petalsd.errors import RemoteFailure

_T = TypeVar("_T")

MISSES = 2  # one may be a lost packet


class Pinged(Protocol):
    """What is asked of a connection to a server."""

    @property
    def peer(self) -> str: ...

    async def is_silent(self, timeout_s: float, /) -> bool:
        """Whether it leaves a ping unanswered while others answer."""


async def while_heard(
    answering: Awaitable[_T],
    server: Pinged,
    options: ClientOptions,
    on_late: Callable[[], None] | None = None,
) -> _T:
    """What ``answering`` returns or raises; RemoteFailure when the server left two pings in a row unanswered.

    ``on_late`` is called once, when there was no answer for ``silence_s``.
    """
    answer: asyncio.Future[_T] = asyncio.ensure_future(answering)
    misses = 0
    try:
        while misses < MISSES:
            await asyncio.wait({answer}, timeout=options.silence_s)
            if answer.done():
                return answer.result()
            if on_late is not None:
                on_late()
                on_late = None
            misses = misses + 1 if await _is_silent_before(answer, server, options.silence_s) else 0
    finally:
        answer.cancel()
    waited_s = 2 * MISSES * options.silence_s
    raise RemoteFailure(server.peer, f"answered nothing, not even pings, for {waited_s:g} s")


async def _is_silent_before(answer: asyncio.Future[Any], server: Pinged, timeout_s: float) -> bool:
    """Whether a ping stays unanswered; False when the answer itself comes first."""
    ping = asyncio.create_task(server.is_silent(timeout_s))
    try:
        await asyncio.wait({answer, ping}, return_when=asyncio.FIRST_COMPLETED)
        return not answer.done() and ping.result()
    finally:
        ping.cancel()
