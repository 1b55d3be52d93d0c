"""Copying and checking large tensors beside the event loop, which must stay responsive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from petalsd.swarm.protocol import MIB

P = ParamSpec("P")
T = TypeVar("T")

_IN_LOOP_BYTES = MIB  # about 0.3 ms of copying; the hop to a thread costs 0.1 ms


async def off_loop(num_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``work`` at once when it handles few bytes, else in a worker thread."""
    if num_bytes <= _IN_LOOP_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
