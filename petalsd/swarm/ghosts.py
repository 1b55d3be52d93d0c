"""Ghosts: servers that went without a goodbye, and whose records tell of them until they expire.

Who does not answer us may be gone, or only out of our reach. What tells the two apart is the record: the living
renew theirs. So a server counts as a ghost when it leaves two pings some seconds apart without an answer and has
not renewed its record since the first; and, if it never answered us at all, when most servers that pinged it say
the same, or most that are asked cannot reach it either. The first answer or renewal makes it count again.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.pings import Ping
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord

log = structlog.get_logger(__name__)

MISSES = 2  # one may be a lost packet
APART_S = 2.0
ASK_AGAIN_S = 60.0  # so long do witnesses repeat what they found
MAX_ASKED = 16
MAX_PINGS = 64  # in one search: a swarm of so many is pinged whole, a larger one suspects first

# Suspects, and servers that answer us -> of some suspects, how many more of those missed it than reached it.
Testify = Callable[[Sequence[str], Sequence[str]], Awaitable[Mapping[str, int]]]


async def nobody_testifies(suspects: Sequence[str], living: Sequence[str]) -> Mapping[str, int]:
    """Where there is nobody to ask."""
    return {}


@dataclass(slots=True)
class _Contact:
    """What pings to one server told.

    misses      the latest pings without an answer, since the last one with an answer
    expiration  of its record at the first of them, Unix seconds
    is_deaf     it renewed its record all the same: it lives, out of our reach
    votes       of witnesses whom we asked: how many more missed it than reached it
    asked_at    when that was
    """

    has_answered: bool = False
    misses: int = 0
    missed_at: float = -math.inf
    expiration: float = 0.0
    is_deaf: bool = False
    votes: int = 0
    asked_at: float = -math.inf


class GhostRule:
    """Judges servers by our pings, their renewals and what others say. Pure; ``now`` is of any one clock."""

    def __init__(self) -> None:
        self._contacts: dict[str, _Contact] = {}

    def pinged(self, peer: str, rtt_s: float, expiration: float, now: float) -> None:
        """A ping took ``rtt_s``, ``inf`` for no answer; the record of ``peer`` lives until ``expiration``."""
        contact = self._contacts.setdefault(peer, _Contact())
        if math.isfinite(rtt_s):
            self._contacts[peer] = _Contact(has_answered=True)
            return
        if not contact.misses:
            contact.expiration = expiration
        if now - contact.missed_at >= APART_S:  # several at once are one
            contact.misses, contact.missed_at = contact.misses + 1, now

    def read(self, expirations: Mapping[str, float]) -> None:
        """Note who has renewed, and forget whose records are gone."""
        self._contacts = {peer: self._contacts[peer] for peer in self._contacts if peer in expirations}
        for peer, contact in self._contacts.items():
            if contact.misses and expirations[peer] > contact.expiration:
                contact.is_deaf = True

    def is_in_doubt(self, peer: str) -> bool:
        """Whether one more ping without an answer would tell more."""
        contact = self._contacts.get(peer)
        return contact is not None and 0 < contact.misses < MISSES and not contact.is_deaf

    def suspects(self) -> list[str]:
        """Who left the latest ping without an answer and may be gone, the longest unheard of first."""
        silent = [(c.missed_at, peer) for peer, c in self._contacts.items() if c.misses and not c.is_deaf]
        return [peer for _, peer in sorted(silent)]

    def is_alive(self, peer: str) -> bool:
        """Whether it answered the latest ping."""
        contact = self._contacts.get(peer)
        return contact is not None and contact.has_answered and not contact.misses

    def unproven(self, reports: Mapping[str, int], now: float) -> list[str]:
        """Who would count as gone if witnesses said so, and none was asked about it lately."""
        gone = self.ghosts(reports)
        return [
            peer
            for peer, contact in self._contacts.items()
            if contact.misses >= MISSES
            and not (contact.is_deaf or peer in gone)
            and now - contact.asked_at >= ASK_AGAIN_S
        ]

    def testified(self, suspects: Iterable[str], votes: Mapping[str, int], now: float) -> None:
        """Witnesses were asked about ``suspects``; ``votes``: how many more missed one than reached it."""
        for peer in suspects:
            if contact := self._contacts.get(peer):
                contact.votes, contact.asked_at = votes.get(peer, 0), now

    def ghosts(self, reports: Mapping[str, int]) -> frozenset[str]:
        """Those who count as gone. ``reports``: how many more of the others say so of a server than deny it.

        They may say what was true some time ago; witnesses who were asked say what is.
        """
        return frozenset(
            peer
            for peer, contact in self._contacts.items()
            if contact.misses >= MISSES
            and not contact.is_deaf
            and (contact.has_answered or (contact.votes or reports.get(peer, 0)) > 0)
        )


class GhostFinder:
    """Pings the servers of a view and tells who of them is gone.

    ``is_in_touch``: whether anybody answers us. While nobody does, the silence is ours and proves nothing.
    ``testify`` asks others about servers that never answered us.
    """

    def __init__(
        self,
        ping: Ping,
        own_peer: str,
        is_in_touch: Callable[[], Awaitable[bool]],
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        testify: Testify = nobody_testifies,
    ) -> None:
        self._ping = ping
        self._own_peer = own_peer
        self._is_in_touch = is_in_touch
        self._clock = clock
        self._rng = rng or random.Random()
        self._testify = testify
        self._rule = GhostRule()
        self._searching = asyncio.Lock()
        self.known: frozenset[str] = frozenset()

    async def search(self, view: SwarmView, pause_s: float = APART_S) -> frozenset[str]:
        """Ping, and those who are silent once more after ``pause_s``; the ghosts among the view's servers.

        Takes two timeouts of a ping and the pause at most, and those of the witnesses, if any are asked.
        """
        async with self._searching:
            servers = _servers(view, self._own_peer)
            reports = silence_reports(servers)
            self._rule.read({peer: record.expiration for peer, record in servers.items()})
            await self._ping_all(self._choose(servers, reports), servers)
            if doubtful := [peer for peer in servers if self._rule.is_in_doubt(peer)]:
                await asyncio.sleep(pause_s)
                await self._ping_all(doubtful, servers)
            await self._ask_witnesses(servers, reports)
            found = self._rule.ghosts(reports)
            if found != self.known:
                self._tell(found, servers)
            self.known = found
            return found

    def _tell(self, found: frozenset[str], servers: Mapping[str, ServerRecord]) -> None:
        """Who is no ghost any more lives, or has no record any more."""
        ended = self.known - found
        back, expired = sorted(ended & servers.keys()), sorted(ended - servers.keys())
        log.info("ghosts", gone=sorted(found - self.known), back=back, expired=expired)

    def _choose(self, servers: Mapping[str, ServerRecord], reports: Mapping[str, int]) -> list[str]:
        """Suspects of ours, then of others, then anybody."""
        reported = [peer for peer, more in reports.items() if more > 0 and peer in servers]
        others = self._rng.sample(sorted(servers), min(MAX_PINGS, len(servers)))
        self._rng.shuffle(reported)
        return list(dict.fromkeys([*self._rule.suspects(), *reported, *others]))[:MAX_PINGS]

    async def _ask_witnesses(self, servers: Mapping[str, ServerRecord], reports: Mapping[str, int]) -> None:
        """Of servers that need no relay: they are looked for without one."""
        direct = [peer for peer, record in servers.items() if record.using_relay is False]
        unproven = set(self._rule.unproven(reports, self._clock()))
        if suspects := [peer for peer in direct if peer in unproven][:MAX_ASKED]:
            living = [peer for peer in direct if self._rule.is_alive(peer)]
            self._rng.shuffle(living)
            votes = await self._testify(suspects, living)
            self._rule.testified(suspects, votes, self._clock())

    async def _ping_all(self, peers: Collection[str], servers: Mapping[str, ServerRecord]) -> None:
        rtts = dict(zip(peers, await asyncio.gather(*map(self._ping, peers)), strict=True))
        if all(map(math.isinf, rtts.values())) and not await self._is_in_touch():
            return
        now = self._clock()
        for peer, rtt_s in rtts.items():
            self._rule.pinged(peer, rtt_s, servers[peer].expiration, now)


def silence_reports(servers: Mapping[str, ServerRecord]) -> dict[str, int]:
    """For each server that others pinged: how many more got no answer than got one."""
    reports: dict[str, int] = {}
    for witness in servers.values():
        for peer, rtt_s in (witness.next_pings or {}).items():
            reports[peer] = reports.get(peer, 0) + (1 if math.isinf(rtt_s) else -1)
    return reports


def _servers(view: SwarmView, own_peer: str) -> dict[str, ServerRecord]:
    """The others that serve or load blocks; of a server's records the one that lives longest."""
    servers: dict[str, ServerRecord] = {}
    for peer, record in _entries(view):
        if record.state >= ServerState.JOINING and peer != own_peer:
            known = servers.get(peer)
            if known is None or record.expiration > known.expiration:
                servers[peer] = record
    return servers


def _entries(view: SwarmView) -> Iterable[tuple[str, ServerRecord]]:
    return (entry for records in view.blocks for entry in records.items())
