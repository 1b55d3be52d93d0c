"""Trying again: a bounded number of times, with growing delays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """``attempts`` in all; the delay between them starts at ``first_delay_s`` and doubles to ``max_delay_s``."""

    attempts: int
    first_delay_s: float
    max_delay_s: float

    def delay_s(self, failures: int) -> float:
        """How long to wait after the ``failures``-th failure (from 1)."""
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** (failures - 1))


async def retry(
    work: Callable[[], Awaitable[_T]],
    backoff: Backoff,
    temporary: tuple[type[Exception], ...],
    on_failure: Callable[[Exception, float], None],
) -> _T:
    """The result of ``work``; its last error when all attempts failed, any other error than ``temporary`` at once.

    ``on_failure(error, delay_s)`` is called before each wait.
    """
    for failures in range(1, backoff.attempts):
        try:
            return await work()
        except temporary as error:
            delay_s = backoff.delay_s(failures)
            on_failure(error, delay_s)
        await asyncio.sleep(delay_s)
    return await work()
