"""Routing is Petals' cost model: the route is the cheapest one, and its price is what protocol.md 4.4 says."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from petalsd.client.routing import Hop, RoutingFacts, route_by_latency, route_by_throughput
from petalsd.errors import MissingBlocks
from petalsd.swarm.directory import RemoteSpan
from petalsd.types import BlockSpan
from tests.client.fake_swarm import make_span


def names(hops: list[Hop]) -> list[tuple[str, int, int]]:
    return [(hop.peer, hop.blocks.start, hop.blocks.end) for hop in hops]


def route(spans: list[RemoteSpan], end: int, facts: RoutingFacts | None = None, start: int = 0) -> list[Hop]:
    return route_by_latency(spans, BlockSpan(start, end), 100, facts or RoutingFacts("tiny"))


def test_one_server_is_better_than_two_equal_ones() -> None:
    """Every hop costs its delay and overhead."""
    spans = [make_span("a", 0, 4), make_span("b", 4, 8), make_span("c", 0, 8)]
    assert names(route(spans, 8)) == [("c", 0, 8)]


def test_a_slow_server_is_avoided_where_hops_are_cheaper() -> None:
    """Eight blocks at 1/s cost eight seconds; two quick servers and their hops cost less."""
    spans = [make_span("a", 0, 4), make_span("b", 4, 8), make_span("c", 0, 8, inference_rps=1.0)]
    assert names(route(spans, 8)) == [("a", 0, 4), ("b", 4, 8)]


def test_a_span_is_entered_in_the_middle_and_left_at_its_end() -> None:
    """A route stays on a server to the end of its span, whatever follows sooner."""
    spans = [make_span("a", 0, 5), make_span("b", 3, 8)]
    assert names(route(spans, 8)) == [("a", 0, 5), ("b", 5, 8)]


def test_a_part_of_the_model_is_routed_alone() -> None:
    """Recovery routes only the lost range; spans beyond it are cut."""
    spans = [make_span("a", 0, 5), make_span("b", 3, 8)]
    assert names(route(spans, 4, start=2)) == [("a", 2, 4)]


def test_pings_decide_between_equal_servers() -> None:
    """Ours to the first and from the last server, the servers' own in between."""
    spans = [
        make_span("a1", 0, 4, next_pings={"b1": 4.0, "b2": 0.01}),
        make_span("a2", 0, 4, next_pings={"b1": 0.01, "b2": 4.0}),
        make_span("b1", 4, 8),
        make_span("b2", 4, 8),
    ]
    near_a2 = RoutingFacts("tiny", {"a1": 0.2, "a2": 0.1, "b1": 0.1, "b2": 0.1})
    assert names(route(spans, 8, near_a2)) == [("a2", 0, 4), ("b1", 4, 8)]
    far_b1 = RoutingFacts("tiny", {"a1": 0.2, "a2": 0.2, "b1": 6.0, "b2": 0.1})
    assert names(route(spans, 8, far_b1)) == [("a1", 0, 4), ("b2", 4, 8)]


def test_an_unreachable_server_costs_five_seconds() -> None:
    """``inf`` is capped, so that a server nobody else replaces stays usable."""
    spans = [make_span("a", 0, 4), make_span("slow", 0, 4, inference_rps=1.0)]
    assert names(route(spans, 4, RoutingFacts("tiny", {"a": math.inf}))) == [("slow", 0, 4)]
    assert names(route(spans[:1], 4, RoutingFacts("tiny", {"a": math.inf}))) == [("a", 0, 4)]


@pytest.mark.parametrize(("left", "chosen"), [(799, "slow"), (800, "a"), (None, "a")])
def test_a_cache_too_small_costs_ten_seconds(left: int | None, chosen: str) -> None:
    """Too small: twice the tokens times the whole span do not fit; unknown fits."""
    spans = [make_span("a", 0, 4, cache_tokens_left=left), make_span("slow", 0, 4, inference_rps=1.0)]
    assert names(route(spans, 4)) == [(chosen, 0, 4)]


def test_a_banned_server_is_used_only_where_nobody_else_serves() -> None:
    """A ban costs more than any detour and less than having no route."""
    spans = [make_span("a", 0, 8), make_span("b", 0, 3, inference_rps=0.1), make_span("c", 3, 6)]
    banned = RoutingFacts("tiny", banned={"a"})
    assert names(route(spans, 6, banned)) == [("b", 0, 3), ("c", 3, 6)]
    assert names(route(spans, 8, banned))[-1][0] == "a"


def test_a_rate_of_zero_does_not_divide() -> None:
    """Anybody may publish anything; such a server is merely slow."""
    spans = [make_span("zero", 0, 4, inference_rps=0.0), make_span("a", 0, 4)]
    assert names(route(spans, 4)) == [("a", 0, 4)]
    assert names(route(spans[:1], 4)) == [("zero", 0, 4)]


def test_missing_blocks_are_named() -> None:
    """The error says which blocks nobody holds."""
    with pytest.raises(MissingBlocks) as caught:
        route([make_span("a", 0, 2), make_span("b", 4, 6)], 7)
    assert caught.value.blocks == [2, 3, 6]


def all_routes(spans: list[RemoteSpan], blocks: BlockSpan) -> list[list[Hop]]:
    """Every route that stays on a server to its end."""
    found: list[list[Hop]] = []
    for server in spans:
        if blocks.start in server.span:
            end = min(server.span.end, blocks.end)
            hop = Hop(server, BlockSpan(blocks.start, end))
            rests: list[list[Hop]] = (
                [[]] if end == blocks.end else all_routes(spans, BlockSpan(end, blocks.end))
            )
            found.extend([hop, *rest] for rest in rests)
    return found


def price(hops: list[Hop], max_tokens: int, facts: RoutingFacts) -> float:
    """protocol.md 4.4, spelled out."""

    def delay(rtt: float | None) -> float:
        return 0.15 if rtt is None else min(rtt / 2, 5.0)

    total = delay(facts.rtt_s.get(hops[0].peer)) + delay(facts.rtt_s.get(hops[-1].peer))
    for before, hop in itertools.pairwise(hops):
        total += delay((before.server.record.next_pings or {}).get(hop.peer))
    for hop in hops:
        record, span = hop.server.record, hop.server.span
        left = record.cache_tokens_left
        total += 0.018 + (10.0 if left is not None and 2 * max_tokens * len(span) > left else 0.0)
        total += len(hop.blocks) / (record.inference_rps or 300.0)
    return total


@pytest.mark.parametrize("seed", range(30))
def test_no_route_is_cheaper(seed: int) -> None:
    """Against all routes of a random swarm, priced by the letter of the protocol."""
    rng = random.Random(seed)
    peers = [f"p{i}" for i in range(7)]
    spans = [make_span("whole", 0, 6, inference_rps=2.0)]
    for peer in peers:
        start = rng.randrange(6)
        pings = {other: rng.choice([0.01, 1.0, math.inf]) for other in rng.sample(peers, 4)}
        spans.append(
            make_span(
                peer,
                start,
                rng.randint(start + 1, 8),
                inference_rps=rng.choice([None, 0.5, 20.0, 400.0]),
                cache_tokens_left=rng.choice([None, 100, 100_000]),
                next_pings=rng.choice([None, pings]),
            )
        )
    facts = RoutingFacts("tiny", {peer: rng.uniform(0, 3) for peer in rng.sample(peers, 3)})
    blocks = BlockSpan(0, 6)
    best = min(price(hops, 100, facts) for hops in all_routes(spans, blocks))
    chosen = route_by_latency(spans, blocks, 100, facts)
    assert price(chosen, 100, facts) == pytest.approx(best)
    assert [block for hop in chosen for block in hop.blocks] == list(blocks)


def test_passes_prefer_long_spans_and_shun_unreachable_and_banned_ones() -> None:
    """The share of each server is its span's length; a last ping of inf or a ban makes it a millionth."""
    spans = [make_span("long", 0, 6), make_span("short", 0, 2), make_span("rest", 2, 6)]
    rng, blocks = random.Random(0), BlockSpan(0, 6)

    def share_of_long(facts: RoutingFacts) -> float:
        first = [route_by_throughput(spans, blocks, facts, rng)[0].peer for _ in range(2000)]
        return first.count("long") / len(first)

    assert share_of_long(RoutingFacts("tiny")) == pytest.approx(0.75, abs=0.04)
    assert share_of_long(RoutingFacts("tiny", {"long": math.inf})) < 0.01
    assert share_of_long(RoutingFacts("tiny", banned={"short"})) > 0.99


def test_a_pass_covers_all_blocks_in_order() -> None:
    """Each server is run to its end or to the end of the range."""
    spans = [make_span("a", 0, 3), make_span("b", 2, 9)]
    hops = route_by_throughput(spans, BlockSpan(1, 7), RoutingFacts("tiny"), random.Random(1))
    assert names(hops) == [("a", 1, 3), ("b", 3, 7)]


def test_a_large_swarm_is_not_looked_through_for_each_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 2000 servers that took nine seconds, in which the client did nothing else."""
    num_looks = 0
    contains = BlockSpan.__contains__

    def look(self: BlockSpan, block: object) -> bool:
        nonlocal num_looks
        num_looks += 1
        return contains(self, block)

    spans = [make_span(f"{number:03}", number % 18, number % 18 + 3) for number in range(180)]
    monkeypatch.setattr(BlockSpan, "__contains__", look)
    assert names(route(spans, 20))[-1][2] == 20
    assert num_looks <= len(spans) * 20
