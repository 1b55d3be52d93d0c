"""Our entry in the directory: written on every change, when it has news, and before it expires."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import structlog

from petalsd.errors import PetalsdError, SwarmError
from petalsd.swarm.dht_storage import LIMITS
from petalsd.swarm.directory import parse_entries
from petalsd.swarm.news import is_news
from petalsd.swarm.node import Node
from petalsd.swarm.observer import NullObserver, SwarmObserver
from petalsd.swarm.pings import PingTracker, choose_targets
from petalsd.swarm.protocol import MODELS_KEY, PRIVATE_PREFIX, ServerState, make_uid
from petalsd.swarm.record import ModelRecord, ServerRecord
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_MIN_LIFETIME_S = 3.0
_TICK_S = 0.01  # by how much a later entry outlives an earlier one at least
_MAX_AHEAD_S = LIMITS.max_lifetime_s  # what outlasts that, no node of petalsd keeps
_STORE_TIMEOUT_S = 30.0
_FIRST_RENEWAL_S = 10.0  # the first pings come soon after the start
_WATCH_S = 5.0
_MIN_PAUSE_S = 15.0  # between two writings of news
_FIRST_RETRY_S, _LAST_RETRY_S = 2.0, 60.0

# Makes the record of a state and span as things are now; the announcer adds the pings.
RecordMaker = Callable[[ServerState, BlockSpan], ServerRecord]


# What some blocks are announced as.
Part: TypeAlias = tuple[ServerState, BlockSpan]


@dataclass(frozen=True, slots=True)
class AnnouncerOptions:
    """What to announce besides the record. ``repository``: URL of the model, None for a local one."""

    prefix: str
    num_blocks: int
    repository: str | None = None
    update_period_s: float = 120.0

    @property
    def lifetime_s(self) -> float:
        return max(2 * self.update_period_s, _MIN_LIFETIME_S)

    @property
    def min_pause_s(self) -> float:
        """News that come sooner after the last writing wait."""
        return min(_MIN_PAUSE_S, self.update_period_s / 4)

    def retry_s(self, num_failures: int) -> float:
        """How long to wait after so many failures in a row, before chance shortens it."""
        longest = min(_LAST_RETRY_S, self.update_period_s)
        return min(_FIRST_RETRY_S * 2.0 ** min(num_failures - 1, 16), longest)


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the swarm was told, and when (``time.monotonic``)."""

    state: ServerState
    at_monotonic_s: float


class Announcer:
    """Says what we serve, and only that. ``announce`` returns when it is stored."""

    def __init__(
        self,
        node: Node,
        options: AnnouncerOptions,
        make_record: RecordMaker,
        observer: SwarmObserver | None = None,
    ) -> None:
        self._node = node
        self._options = options
        self._make_record = make_record
        self._observer = observer or NullObserver()
        self._pings = PingTracker(node.ping)
        self._rng = random.Random()
        self._lock = asyncio.Lock()
        self._current: tuple[Part, ...] = ()
        # Blocks that were left and are not told OFFLINE yet, with the time (Unix seconds) when it tells itself.
        self._left: list[tuple[BlockSpan, float]] = []
        self._goal: BlockSpan | None = None
        self._since: float | None = None  # when the span came online, while it is all that is announced
        self._expiration = 0.0
        self._told: dict[BlockSpan, ServerRecord] = {}  # what is stored of the current parts
        self.last_stored: Announcement | None = None
        self._renewal: asyncio.Task[None] | None = None

    async def announce(self, state: ServerState, span: BlockSpan) -> None:
        """Publish ``state`` for ``span``, and nothing else, as ``announce_parts``."""
        await self.announce_parts([(state, span)])

    async def announce_parts(self, parts: Sequence[Part], goal: BlockSpan | None = None) -> None:
        """Publish these now, in order, and keep renewing them; blocks of before that are in none go OFFLINE first.

        The last one is what is served, if anything is. JOINING ones claim ``goal``, which they are to be served
        with; None: themselves. SwarmError or DeadlineExceeded when something could not be stored; renewing goes
        on trying, also to say OFFLINE.
        """
        async with self._lock:
            old, self._current, self._told = self._current, tuple(parts), {}
            self._goal = goal
            if self._current != old:
                is_whole = [state for state, _ in parts] == [ServerState.ONLINE]
                self._since = time.time() if is_whole else None
            self._leave(span for state, span in old if state != ServerState.OFFLINE)
            await self._retract()
            for state, span in parts:
                await self._publish(state, span)
        for state, span in parts:
            log.info("announced", state=state.name, span=str(span))

    async def renew(self) -> None:
        """Measure the pings and publish the current entries again; does nothing while none is announced."""
        if not self._current:
            return
        await self._measure(self._current[-1][1])
        async with self._lock:
            await self._catch_up(self._current)

    async def write_news(self) -> None:
        """Publish what says something else by now again, with the pings that are known."""
        async with self._lock:
            await self._catch_up([part for part in self._current if self._has_news(*part)])

    def pings(self) -> dict[str, float]:
        """Round trips in seconds to servers that a route may go to after us, ``inf`` for no answer."""
        return self._pings.averages()

    def start(self) -> None:
        """Renew every update period from now on, and write news in between."""
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew_forever(), name="announcer")

    async def stop(self) -> None:
        """Stop renewing; what is stored stays until it expires, so announce OFFLINE first."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
            self._renewal = None

    async def _renew_forever(self) -> None:
        options, num_failures = self._options, 0
        pause_s = min(_FIRST_RENEWAL_S, options.update_period_s)
        while True:
            try:
                if num_failures:
                    await asyncio.sleep(pause_s)
                else:
                    await self._write_news_for(pause_s)
                await self.renew()
                num_failures, pause_s = 0, options.update_period_s
            except Exception as error:  # whatever it was: to fall silent would be to leave the swarm
                num_failures += 1
                pause_s = options.retry_s(num_failures) * self._rng.uniform(0.5, 1.0)
                is_bug = not isinstance(error, PetalsdError)
                log.warning("announcing_failed", error=str(error), retry_s=round(pause_s, 1), exc_info=is_bug)

    async def _write_news_for(self, seconds: float) -> None:
        """Until they are over, also by the wall clock: entries age while a machine sleeps or its clock is set."""
        end, wall_end = time.monotonic() + seconds, time.time() + seconds + _WATCH_S
        while (left_s := end - time.monotonic()) > 0 and time.time() < wall_end:
            await asyncio.sleep(min(left_s, _WATCH_S, self._options.min_pause_s))
            stored = self.last_stored
            if stored is None or time.monotonic() - stored.at_monotonic_s >= self._options.min_pause_s:
                await self.write_news()

    def _leave(self, spans: Iterable[BlockSpan]) -> None:
        """These, and those before, are OFFLINE as far as they are not announced anew."""
        current = [span for _, span in self._current]
        leaving = [*self._left, *((span, self._expiration) for span in spans)]
        self._left = [(left, end) for span, end in leaving for left in span.minus(*current)]

    async def _retract(self) -> None:
        """Say OFFLINE of what was left, unless the record of before has expired."""
        while self._left:
            span, end = self._left[0]
            if end > time.time():
                await self._publish(ServerState.OFFLINE, span)
            del self._left[0]

    async def _catch_up(self, parts: Sequence[Part]) -> None:
        """Publish these, and what could not be told before; one does not wait for the other."""
        failure: PetalsdError | None = None
        try:
            await self._retract()
        except PetalsdError as error:
            failure = error
        for state, span in parts:
            await self._publish(state, span)
        if failure is not None:
            raise failure

    def _has_news(self, state: ServerState, span: BlockSpan) -> bool:
        if state == ServerState.OFFLINE:
            return False
        told = self._told.get(span)
        return told is None or is_news(told, self._describe(state, span))

    def _describe(self, state: ServerState, span: BlockSpan) -> ServerRecord:
        pings = None if state == ServerState.OFFLINE else self._pings.averages()
        goal = self._goal or span
        record = self._make_record(state, max(span, goal, key=len))  # a part is no faster than the whole
        claim = goal if state == ServerState.JOINING else span
        return replace(record, state=state, span=claim, online_since=self._since, next_pings=pings)

    async def _publish(self, state: ServerState, span: BlockSpan) -> None:
        record = self._describe(state, span)
        self._told.pop(span, None)
        try:
            await self._store([make_uid(self._options.prefix, block) for block in span], record)
        except PetalsdError:
            self._observer.announced(False)
            raise
        self._observer.announced(True)
        self._told[span] = record
        self.last_stored = Announcement(state, time.monotonic())
        is_private = self._options.prefix.startswith(PRIVATE_PREFIX)
        if state != ServerState.OFFLINE and not is_private:
            await self._store_model()

    async def _store(self, uids: list[str], record: ServerRecord) -> None:
        """Store under all ``uids``; once more past the entries that outlive ours, from before a restart."""
        value, peer = record.to_wire(), self._node.peer_id
        refused = await self._node.store(uids, peer, value, self._next_expiration(), _STORE_TIMEOUT_S)
        if refused:
            await self._outlive(refused)
            refused = await self._node.store(refused, peer, value, self._next_expiration(), _STORE_TIMEOUT_S)
        if refused:
            raise SwarmError(
                f"no node of the swarm stored our record for {len(refused)} of {len(uids)} blocks",
                hint="check the connection to the swarm",
            )

    async def _store_model(self) -> None:
        record = ModelRecord(self._options.num_blocks, self._options.repository).to_wire()
        refused = await self._node.store(
            [MODELS_KEY], self._options.prefix, record, self._next_expiration(), _STORE_TIMEOUT_S
        )
        if refused:  # another server of the model has just said the same
            log.debug("model_record_refused", prefix=self._options.prefix)

    async def _outlive(self, uids: list[str]) -> None:
        found = await self._node.get(uids, _STORE_TIMEOUT_S)
        peer, latest = self._node.peer_id, time.time() + _MAX_AHEAD_S
        if self._expiration > latest:  # our clock was ahead, and nodes whose was not take nothing of then
            self._expiration = 0.0
        for entries in found.values():
            if peer in entries and entries[peer].expiration < latest:
                self._expiration = max(self._expiration, entries[peer].expiration)

    def _next_expiration(self) -> float:
        """A store is accepted only when it expires later than the entry before it."""
        self._expiration = max(time.time() + self._options.lifetime_s, self._expiration + _TICK_S)
        return self._expiration

    async def _measure(self, span: BlockSpan) -> None:
        """Ping the servers that a route may go to after us; the record is published without them if it fails."""
        with contextlib.suppress(PetalsdError):
            wanted = range(span.start + 1, min(span.end + 1, self._options.num_blocks))
            uids = {block: make_uid(self._options.prefix, block) for block in wanted}
            found = await self._node.get(list(uids.values()), _STORE_TIMEOUT_S)
            blocks = {block: parse_entries(uid, found[uid]) for block, uid in uids.items()}
            await self._pings.measure(choose_targets(blocks, span, self._node.peer_id, self._rng))
