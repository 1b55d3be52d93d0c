"""Waiting for what sends no event: counters kept in C++ or by libp2p, steps of a loop under test."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

DEADLINE_S = 20.0


async def eventually(
    condition: Callable[[], object | Awaitable[object]],
    timeout_s: float = DEADLINE_S,
    interval_s: float = 0.0,
) -> None:
    """Ask again and again until ``condition()`` holds; TimeoutError when it does not in time.

    interval_s  between two questions; 0 only lets the loop turn
    """
    async with asyncio.timeout(timeout_s):
        while True:
            answer = condition()
            if await answer if inspect.isawaitable(answer) else answer:
                return
            await asyncio.sleep(interval_s)
