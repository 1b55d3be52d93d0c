"""What the client knows of the swarm: who serves which blocks, how far away, and who failed lately."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence

import structlog

from petalsd.client.bans import Bans
from petalsd.client.options import ClientOptions
from petalsd.client.routing import Hop, RoutingFacts, route_by_latency, route_by_throughput
from petalsd.errors import DeadlineExceeded, SwarmError
from petalsd.swarm.directory import RemoteSpan, SwarmView
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_PING_WEIGHT = 0.2  # of the newest measurement, as in Petals
_MIN_REFRESH_GAP_S = 0.5


class SequenceManager:
    """Routes calls through blocks ``0:num_blocks`` by the newest view of the directory.

    ``model`` is its DHT prefix, which errors name.
    ``read_view`` reads the directory, ``ping`` measures a round trip in seconds (``inf``: no answer). Lives on one
    loop: ``start`` before the first route, ``stop`` at the end.
    """

    def __init__(
        self,
        read_view: Callable[[], Awaitable[SwarmView]],
        ping: Callable[[str], Awaitable[float]],
        model: str,
        num_blocks: int,
        options: ClientOptions,
        rng: random.Random | None = None,
    ) -> None:
        self.blocks = BlockSpan(0, num_blocks)
        self._model = model
        self._read_view = read_view
        self._ping = ping
        self._options = options
        self._rng = rng or random.Random()
        self._bans = Bans(options.ban_s, options.max_ban_s)
        self._spans: list[RemoteSpan] = []
        self._rtt_s: dict[str, float] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    @property
    def spans(self) -> Sequence[RemoteSpan]:
        """The ONLINE spans of the last view that suit the user's options, banned ones included."""
        return self._spans

    async def start(self) -> None:
        """Read the directory once, then keep reading it in the background."""
        await self.refresh()
        self._loop_task = asyncio.create_task(self._refresh_loop(), name="petalsd-client-refresh")

    async def stop(self) -> None:
        """End the background reading; idempotent."""
        for task in (self._loop_task, self._refreshing):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._loop_task = self._refreshing = None

    def route_session(self, blocks: BlockSpan, max_tokens: int) -> list[Hop]:
        """The quickest servers for an inference session; MissingBlocks when some block has none."""
        return route_by_latency(self._spans, blocks, max_tokens, self._facts())

    def route_pass(self, blocks: BlockSpan) -> list[Hop]:
        """Servers for one forward or backward pass; MissingBlocks when some block has none."""
        return route_by_throughput(self._spans, blocks, self._facts(), self._rng)

    def is_far(self, peer: str) -> bool:
        """Whether pings to it take so long that others should hand it our steps; who was never pinged is."""
        return self._rtt_s.get(peer, math.inf) >= self._options.relay_above_s

    def report_failure(self, peer: str) -> None:
        """Avoid the peer from the next route on, and look who else is there."""
        ban_s = self._bans.add(peer)
        log.debug("peer_banned", peer=peer, ban_s=ban_s)
        self._wake.set()

    def report_success(self, peer: str) -> None:
        self._bans.clear(peer)

    async def refresh(self) -> None:
        """Read the directory now; callers at the same time share one reading. A failed one leaves the old view."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh_once(), name="petalsd-client-read")
        await asyncio.shield(self._refreshing)

    async def _refresh_once(self) -> None:
        try:
            async with asyncio.timeout(self._options.refresh_timeout_s):
                view = await self._read_view()
        except (SwarmError, DeadlineExceeded, TimeoutError) as error:
            log.warning("directory_unreadable", error=str(error))
            return
        spans = view.spans(ServerState.ONLINE)
        self._spans = [span for span in spans if self._options.suits(span)]
        await self._ping_sample()

    async def _refresh_loop(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._options.refresh_period_s):
                    await self._wake.wait()
            self._wake.clear()
            await self.refresh()
            await asyncio.sleep(_MIN_REFRESH_GAP_S)

    async def _ping_sample(self) -> None:
        """Measure some servers of the first and of the last block, which we talk to, and some in between."""
        inner = BlockSpan(1, self.blocks.end - 1) if len(self.blocks) > 2 else None
        groups = [
            [span.peer for span in self._spans if self.blocks.start in span.span],
            [span.peer for span in self._spans if self.blocks.end - 1 in span.span],
            [span.peer for span in self._spans if inner and span.span.intersect(inner)],
        ]
        chosen: set[str] = set()
        for group in groups:
            chosen.update(self._rng.sample(group, min(len(group), self._options.max_pinged)))
        await asyncio.gather(*(self._measure(peer) for peer in chosen))
        self._forget_pings(span.peer for span in self._spans)

    async def _measure(self, peer: str) -> None:
        try:
            async with asyncio.timeout(self._options.ping_timeout_s):
                rtt_s = await self._ping(peer)
        except (SwarmError, DeadlineExceeded, TimeoutError):
            rtt_s = math.inf
        old_s = self._rtt_s.get(peer, math.inf)
        is_smooth = math.isfinite(old_s) and math.isfinite(rtt_s)
        self._rtt_s[peer] = _PING_WEIGHT * rtt_s + (1 - _PING_WEIGHT) * old_s if is_smooth else rtt_s

    def _forget_pings(self, known: Iterable[str]) -> None:
        peers = set(known)
        self._rtt_s = {peer: rtt_s for peer, rtt_s in self._rtt_s.items() if peer in peers}

    def _facts(self) -> RoutingFacts:
        return RoutingFacts(self._model, self._rtt_s, self._bans.current(), self._options.adapter)
