"""A node of ours in the swarm, as whoever looks after it sees it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from petalsd.errors import SwarmError

_P2PD_ANSWERS_S = 5.0


class SwarmPresence(Protocol):
    """Whatever the node is there for."""

    @property
    def peer_id(self) -> str: ...

    async def start(self) -> None:
        """Join. SwarmError says why it cannot."""

    async def stop(self) -> None:
        """Leave; idempotent, bounded in time, works on a broken one too."""

    async def until_failed(self) -> str:
        """Wait until it is broken for good; the reason. ``stop`` and ``start`` heal it."""

    async def maddrs(self) -> list[str]:
        """Addresses under which others reach us, asked of the libp2p daemon."""

    async def renew(self) -> None:
        """Write what was announced last once more, with fresh pings. SwarmError or DeadlineExceeded."""

    async def is_in_touch(self) -> bool:
        """Whether any other peer answers, dialling the first ones again; True where there is nobody else to be."""


async def presence_problem(presence: SwarmPresence) -> str | None:
    """The libp2p daemon itself knows its addresses: one that does not tell them hangs. None: nothing is wrong."""
    try:
        async with asyncio.timeout(_P2PD_ANSWERS_S):
            await presence.maddrs()
    except TimeoutError:
        return f"the libp2p daemon did not answer within {_P2PD_ANSWERS_S:g} s"
    except SwarmError as error:
        return str(error)
    return None
