"""Whether a record says enough that is new to be written before its time."""

from __future__ import annotations

from petalsd.swarm.record import ServerRecord

_RATE_CHANGE = 0.05
# Clients only ask whether the longest session that they plan fits.
_CACHE_CHANGE = 0.25

_FACTS = (
    "state",
    "span",
    "public_name",
    "version",
    "adapters",
    "torch_dtype",
    "quant_type",
    "using_relay",
    "max_blocks",
)
_RATES = ("throughput", "network_rps", "forward_rps", "inference_rps")


def is_news(told: ServerRecord, now: ServerRecord) -> bool:
    """Whether ``now`` differs from what was ``told`` by more than others should be left to believe; pings aside.

    Rates may differ by 5 % of the larger, the room in the cache by a quarter.
    """
    return (
        any(getattr(told, name) != getattr(now, name) for name in _FACTS)
        or any(_differ(getattr(told, name), getattr(now, name), _RATE_CHANGE) for name in _RATES)
        or _differ(told.cache_tokens_left, now.cache_tokens_left, _CACHE_CHANGE)
    )


def _differ(old: float | None, new: float | None, share: float) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(new - old) > share * max(old, new)
