"""Asking other peers whether they reach a server that does not answer us (protocol.md 3.12)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Sequence

from hivemind.p2p import PeerID

from petalsd.swarm.node import Node
from petalsd.swarm.reachability import ask

_MAX_WITNESSES = 3
_MAX_AT_ONCE = 4  # questions to one; servers of petalsd answer no more
_DEADLINE_S = 10.0


class Witnesses:
    """Asks peers with the voice of ``node``."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def testify(self, suspects: Sequence[str], living: Sequence[str]) -> Counter[str]:
        """For each suspect that was looked for, how many more witnesses missed it than reached it.

        ``living``: servers that answer us; the first of them are asked. Who cannot find another one of them, or
        else us, is no witness. Takes ten seconds at most.
        """
        others = [peer for peer in self._node.known_peers() if peer not in {*living, *suspects}]
        votes: Counter[str] = Counter()
        hearings = [
            self._hear(witness, suspects, living, votes) for witness in [*living, *others][:_MAX_WITNESSES]
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEADLINE_S):
                await asyncio.gather(*hearings)
        return votes

    async def _hear(
        self, witness: str, suspects: Sequence[str], living: Collection[str], votes: Counter[str]
    ) -> None:
        known = next((peer for peer in living if peer != witness), self._node.peer_id)
        if await self._is_missed(witness, known) is not False:
            return
        turns = asyncio.Semaphore(_MAX_AT_ONCE)

        async def vote(suspect: str) -> None:
            async with turns:
                is_missed = await self._is_missed(witness, suspect)
            if is_missed is not None:
                votes[suspect] += 1 if is_missed else -1

        await asyncio.gather(*map(vote, suspects))

    async def _is_missed(self, witness: str, peer: str) -> bool | None:
        """None when the witness does not say."""
        try:
            through, about = PeerID.from_base58(witness), PeerID.from_base58(peer)
        except ValueError:  # a record under what is no PeerID
            return None
        is_reached = await ask(self._node.p2p, through, about, _DEADLINE_S)
        return None if is_reached is None else not is_reached
