"""Whether the parts still work, proved by something that went through them. None means that nothing is wrong."""

from __future__ import annotations

import asyncio
import time

from petalsd.daemon.parts import ServingEngine, SwarmMember
from petalsd.errors import PetalsdError, SwarmError

# One batch or unit of a pass takes a small part of this on any machine that is worth announcing, and so do the
# kernels that are compiled for the first one.
_ENGINE_STUCK_S = 120.0
_P2PD_ANSWERS_S = 5.0


async def engine_problem(engine: ServingEngine) -> str | None:
    """A canary crosses the device when it is idle; when it is busy, its work must move."""
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


async def member_problem(member: SwarmMember) -> str | None:
    """The libp2p daemon itself knows its addresses: one that does not tell them hangs."""
    try:
        async with asyncio.timeout(_P2PD_ANSWERS_S):
            await member.maddrs()
    except TimeoutError:
        return f"the libp2p daemon did not answer within {_P2PD_ANSWERS_S:g} s"
    except SwarmError as error:
        return str(error)
    return None
