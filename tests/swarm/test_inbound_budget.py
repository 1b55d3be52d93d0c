"""What the messages of all streams may hold, and those of one peer."""

from __future__ import annotations

import pytest

from petalsd.errors import Overloaded
from petalsd.swarm.inbound_budget import InboundBudget


def test_one_peer_leaves_half_to_others() -> None:
    """Its streams share what it may have; what it gives back is there for all again."""
    budget = InboundBudget(max_message_bytes=10, max_total_bytes=100)
    first, second, other = (budget.share_of(peer) for peer in ("greedy", "greedy", "modest"))
    first.take(30)
    second.take(20)
    with pytest.raises(Overloaded, match="50 bytes of requests of yours are under way, a peer may have 50"):
        second.take(1)
    other.take(50)
    with pytest.raises(Overloaded, match="100 bytes of requests are under way, the limit is 100"):
        budget.take(1)
    first.give_back(30)
    second.take(30)
    for share in (second, other):
        share.give_back(50)
    assert budget.held_bytes == 0


def test_a_message_of_any_size_is_taken() -> None:
    """Half of a small budget may be less than the largest message, which a peer may send all the same."""
    budget = InboundBudget(max_message_bytes=80, max_total_bytes=100)
    share = budget.share_of("p")
    share.take(80)
    with pytest.raises(Overloaded):
        share.take(1)


def test_what_is_refused_counts_nowhere() -> None:
    """Neither the whole's refusal nor the share's leaves a trace."""
    budget = InboundBudget(max_message_bytes=10, max_total_bytes=100)
    share = budget.share_of("p")
    budget.take(90)
    with pytest.raises(Overloaded):
        share.take(20)
    budget.give_back(90)
    share.take(50)
    with pytest.raises(Overloaded):
        share.take(1)
    assert budget.held_bytes == 50
