"""Joining the swarm, tried again a bounded number of times."""

from __future__ import annotations

import structlog

from petalsd.daemon.backoff import Backoff, retry
from petalsd.daemon.components import Parts
from petalsd.errors import DeadlineExceeded, SwarmError
from petalsd.log import error_fields

log = structlog.get_logger(__name__)

JOIN_BACKOFF = Backoff(attempts=6, first_delay_s=1.0, max_delay_s=15.0)


async def join(parts: Parts, backoff: Backoff) -> None:
    """Returns as a member; raises what the last attempt failed with."""

    def on_failure(error: Exception, delay_s: float) -> None:
        log.warning("join_failed", retry_s=delay_s, **error_fields(error))
        parts.board.blame("join_failed", error)

    parts.activity.at("joining the swarm")
    await retry(parts.member.start, backoff, (SwarmError, DeadlineExceeded), on_failure)
