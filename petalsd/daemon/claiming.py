"""Claiming blocks before they are loaded: servers that chose at the same moment see each other only then."""

from __future__ import annotations

import asyncio
import time

import structlog

from petalsd.daemon.components import Parts
from petalsd.errors import DeadlineExceeded, SwarmError
from petalsd.log import error_fields
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_LOOKS = 4
# Others may be slower at it than we were.
_ANNOUNCEMENTS = 3.0
_MIN_PAUSE_S = 0.5


async def claim(parts: Parts, span: BlockSpan) -> BlockSpan:
    """Announce that we are about to load ``span``, or others where that is too much; returns what is announced.

    Returns when nobody disputes it, or after some looks at the directory. A span that the configuration names is
    not given up. SwarmError or DeadlineExceeded when the announcement cannot be stored.
    """
    pause_s = await _announce(parts, span)
    if parts.demand().pinned is not None:
        return span
    for look in range(_LOOKS):
        await asyncio.sleep(pause_s)
        try:
            review = parts.rebalancer.review((await parts.member.read_view()).without_ghosts())
        except (SwarmError, DeadlineExceeded, ValueError) as error:
            log.warning("claim_not_reviewed", span=str(span), **error_fields(error))
            break
        if review.is_undisputed:
            break
        # Others are to make way, but may not follow this rule, or not look any more.
        target = review.alone if look == _LOOKS - 1 else review.target
        if target != span:
            log.info("claim_given_up", span=str(span), target=str(target))
            span = target
            pause_s = await _announce(parts, span)
    return span


async def _announce(parts: Parts, span: BlockSpan) -> float:
    """Announce JOINING; in how many more seconds others, too, have announced what they chose without seeing it."""
    parts.activity.at(f"announcing blocks {span}")
    began_s = time.monotonic()
    await parts.member.announce(ServerState.JOINING, span)
    longest_s = 2.0 * parts.settings.config.blocks.join_delay_s
    return min(max(_ANNOUNCEMENTS * (time.monotonic() - began_s), _MIN_PAUSE_S), longest_s)
