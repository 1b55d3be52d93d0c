"""Whether the engine still works, proved by something that went through it."""

from __future__ import annotations

import asyncio
import time

from petalsd.daemon.parts import ServingEngine
from petalsd.errors import PetalsdError

# One batch or unit of a pass takes a small part of this on any machine that is worth announcing, and so do the
# kernels that are compiled for the first one.
_ENGINE_STUCK_S = 120.0


async def engine_problem(engine: ServingEngine) -> str | None:
    """A canary crosses the device when it is idle; when it is busy, its work must move. None: nothing is wrong."""
    stats = engine.stats()
    if stats.busy_since_monotonic_s is not None:
        busy_s = time.monotonic() - stats.busy_since_monotonic_s
        return f"the engine has been at one batch for {busy_s:.0f} s" if busy_s > _ENGINE_STUCK_S else None
    try:
        async with asyncio.timeout(_ENGINE_STUCK_S):
            await engine.self_test()
    except TimeoutError:
        is_moving = engine.stats().iterations_total > stats.iterations_total
        return None if is_moving else f"the self-test did not come back within {_ENGINE_STUCK_S:g} s"
    except PetalsdError as error:
        return f"the self-test failed: {error}"
    return None
