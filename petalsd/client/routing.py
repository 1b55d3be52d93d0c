"""Which servers a call goes through. Pure functions of the spans, our pings and the bans.

The cost model and its constants are those of Petals' client (routing/sequence_manager.py), so that both kinds of
client spread over a swarm alike. What differs: a banned server costs a ban instead of being forgotten, so it is
entered only where nobody else serves the block.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from petalsd.errors import MissingBlocks
from petalsd.swarm.directory import RemoteSpan
from petalsd.types import BlockSpan

UNKNOWN_DELAY_S = 0.15  # one way, to a server that was never pinged
MAX_DELAY_S = 5.0
OVERHEAD_S = 0.018  # serialization and queueing of one hop
CACHE_MISS_S = 10.0  # what a hop costs whose cache is too small for the session
BAN_S = 1000.0
DEFAULT_RPS = 300.0
MIN_RPS = 0.01  # guards the division: anybody may publish anything
UNREACHABLE_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True)
class Hop:
    """One server of a route and the blocks that it runs."""

    server: RemoteSpan
    blocks: BlockSpan

    @property
    def peer(self) -> str:
        return self.server.peer


@dataclass(frozen=True, slots=True)
class RoutingFacts:
    """What routing knows beside the spans, which are of ``model`` and all have the adapter: our round trips in
    seconds by peer, and who is banned."""

    model: str
    rtt_s: Mapping[str, float] = field(default_factory=dict)
    banned: Collection[str] = ()
    adapter: str | None = None


def route_by_latency(
    spans: Sequence[RemoteSpan], blocks: BlockSpan, max_tokens: int, facts: RoutingFacts
) -> list[Hop]:
    """The route through ``blocks`` with the lowest expected time per token (Dijkstra), for a session.

    A route may enter a span in the middle and leaves it only at its end. MissingBlocks names blocks without a
    server.
    """
    holders = _holders(spans, blocks, facts)
    prices_s = [_entry_price(server, max_tokens, facts) for server in spans]
    queue: list[tuple[float, int, int, int]] = []  # (cost, block entered, span, visit that led here)
    visits: list[tuple[int, int, int]] = []  # (block entered, span, visit before)
    settled: set[tuple[int, int]] = set()
    least: dict[tuple[int, int], float] = {}

    def enter(cost: float, delay_s: float, block: int, before: int) -> None:
        rtt_s = facts.rtt_s if before < 0 else (spans[visits[before][1]].record.next_pings or {})
        for index, candidate in holders[block]:
            total = cost + delay_s + (_one_way_s(rtt_s.get(candidate.peer)) + prices_s[index])
            if total < least.get((block, index), math.inf):
                least[block, index] = total
                heapq.heappush(queue, (total, block, index, before))

    enter(0.0, 0.0, blocks.start, -1)
    best: tuple[float, int] = (math.inf, -1)
    while queue and queue[0][0] < best[0]:
        cost, block, index, before = heapq.heappop(queue)
        if (block, index) in settled:
            continue
        settled.add((block, index))
        visits.append((block, index, before))
        server = spans[index]
        end = min(server.span.end, blocks.end)
        compute_s = (end - block) / _rps(server)
        if end < blocks.end:
            enter(cost, compute_s, end, len(visits) - 1)
        else:
            total = cost + compute_s + _one_way_s(facts.rtt_s.get(server.peer))
            best = min(best, (total, len(visits) - 1))
    return _walk_back(spans, visits, best[1], blocks.end)


def route_by_throughput(
    spans: Sequence[RemoteSpan], blocks: BlockSpan, facts: RoutingFacts, rng: random.Random
) -> list[Hop]:
    """A random route through ``blocks`` for a pass; long spans are likelier, and each runs to its end."""
    holders = _holders(spans, blocks, facts)
    hops: list[Hop] = []
    block = blocks.start
    while block < blocks.end:
        candidates = [server for _, server in holders[block]]
        (server,) = rng.choices(candidates, [_weight(server, facts) for server in candidates])
        hops.append(Hop(server, BlockSpan(block, min(server.span.end, blocks.end))))
        block = hops[-1].blocks.end
    return hops


def _holders(
    spans: Sequence[RemoteSpan], blocks: BlockSpan, facts: RoutingFacts
) -> dict[int, list[tuple[int, RemoteSpan]]]:
    """For each block who serves it, with the numbers in ``spans``. MissingBlocks when somebody is missing."""
    holders: dict[int, list[tuple[int, RemoteSpan]]] = {block: [] for block in blocks}
    for index, server in enumerate(spans):
        for block in server.span.intersect(blocks) or ():
            holders[block].append((index, server))
    if missing := [block for block, those in holders.items() if not those]:
        raise MissingBlocks(missing, facts.model, facts.adapter)
    return holders


def _walk_back(
    spans: Sequence[RemoteSpan], visits: Sequence[tuple[int, int, int]], last: int, end: int
) -> list[Hop]:
    def backwards() -> Iterator[Hop]:
        stop, visit = end, last
        while visit >= 0:
            block, index, visit = visits[visit]
            yield Hop(spans[index], BlockSpan(block, stop))
            stop = block

    return list(backwards())[::-1]


def _one_way_s(rtt_s: float | None) -> float:
    return UNKNOWN_DELAY_S if rtt_s is None else min(rtt_s / 2, MAX_DELAY_S)


def _entry_price(server: RemoteSpan, max_tokens: int, facts: RoutingFacts) -> float:
    left = server.record.cache_tokens_left
    is_full = left is not None and 2 * max_tokens * len(server.span) > left
    return OVERHEAD_S + CACHE_MISS_S * is_full + BAN_S * (server.peer in facts.banned)


def _rps(server: RemoteSpan) -> float:
    rate = server.record.inference_rps
    return DEFAULT_RPS if rate is None else max(rate, MIN_RPS)


def _weight(server: RemoteSpan, facts: RoutingFacts) -> float:
    is_unreachable = facts.rtt_s.get(server.peer) == math.inf
    length = UNREACHABLE_WEIGHT if is_unreachable else float(len(server.span))
    return length * UNREACHABLE_WEIGHT if server.peer in facts.banned else length
