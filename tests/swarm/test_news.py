"""Which changes of a record are worth a writing of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from petalsd.swarm.news import is_news
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

TOLD = ServerRecord(
    ServerState.ONLINE,
    100.0,
    BlockSpan(0, 4),
    network_rps=1000.0,
    forward_rps=400.0,
    inference_rps=50.0,
    using_relay=False,
    cache_tokens_left=8000,
    next_pings={"a": 0.1},
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"throughput": 104.0, "inference_rps": 48.0, "cache_tokens_left": 6100}, False),
        ({"next_pings": {"b": 0.2}, "expiration": 1.0}, False),
        ({"throughput": 106.0}, True),
        ({"inference_rps": 47.0}, True),
        ({"forward_rps": None}, True),
        ({"network_rps": 900.0}, True),
        ({"cache_tokens_left": 5900}, True),
        ({"cache_tokens_left": None}, True),
        ({"using_relay": True}, True),
        ({"span": BlockSpan(0, 5)}, True),
        ({"state": ServerState.JOINING}, True),
    ],
)
def test_news_are_more_than_a_few_percent(changes: dict[str, Any], expected: bool) -> None:
    """Facts count at once, rates from 5 % on, the room in the cache from a quarter on, in both directions."""
    now = replace(TOLD, **changes)
    assert is_news(TOLD, now) is is_news(now, TOLD) is expected


def test_a_cache_that_fills_up_is_news_and_one_that_is_full_is_not() -> None:
    """The first and the last tokens of room are told, and nothing is divided by none."""
    full = replace(TOLD, cache_tokens_left=0)
    assert is_news(replace(TOLD, cache_tokens_left=1), full)
    assert not is_news(full, full)
