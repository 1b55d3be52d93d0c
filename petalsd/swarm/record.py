"""What servers write into the DHT about themselves, and how it is read back (protocol.md 2.2, 2.3).

Anyone may write anything into the DHT, so reading is strict where routing depends on a value and tolerant
everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from petalsd.errors import shortened
from petalsd.swarm.protocol import MAX_MODEL_BLOCKS, ServerState
from petalsd.types import BlockSpan

_MAX_BLOCKS = 1_000_000_000
_MAX_TEXT = 256


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One server's entry under each of its blocks.

    throughput         requests' tokens/s as placement counts them
    span               blocks served; None when the writer did not say
    *_rps              tokens/s: through the network, through one block in passes, through one block in decoding
    cache_tokens_left  K rows plus V rows that still fit, over all blocks (twice the free tokens)
    max_blocks         the most blocks that it may serve, where the rule of placement says how many; ours alone
    online_since       Unix seconds at which it began to serve this span, once it serves all of it; ours alone
    next_pings         round trips in seconds to servers of following blocks, ``inf`` for no answer
    expiration         of a record that was read: Unix seconds; not a part of the record itself
    """

    state: ServerState
    throughput: float
    span: BlockSpan | None = None
    public_name: str | None = None
    version: str | None = None
    network_rps: float | None = None
    forward_rps: float | None = None
    inference_rps: float | None = None
    adapters: tuple[str, ...] = ()
    torch_dtype: str | None = None
    quant_type: str | None = None
    using_relay: bool | None = None
    cache_tokens_left: int | None = None
    max_blocks: int | None = None
    online_since: float | None = None
    next_pings: Mapping[str, float] | None = field(default=None, hash=False)
    expiration: float = field(default=0.0, compare=False)

    def to_wire(self) -> tuple[int, float, dict[str, object]]:
        """The tuple that reference readers accept: real floats (an int drops the entry there), positive rates."""
        extra: dict[str, object] = {
            "public_name": self.public_name,
            "version": self.version,
            "network_rps": _rate("network_rps", self.network_rps),
            "forward_rps": _rate("forward_rps", self.forward_rps),
            "inference_rps": _rate("inference_rps", self.inference_rps),
            "adapters": tuple(str(name) for name in self.adapters),
            "torch_dtype": self.torch_dtype,
            "quant_type": self.quant_type,
            "using_relay": self.using_relay,
            "cache_tokens_left": None
            if self.cache_tokens_left is None
            else max(0, int(self.cache_tokens_left)),
            "next_pings": None
            if self.next_pings is None
            else {str(peer): float(rtt) for peer, rtt in self.next_pings.items() if not math.isnan(rtt)},
        }
        if self.span is not None:
            extra["start_block"] = int(self.span.start)
            extra["end_block"] = int(self.span.end)
        if self.max_blocks is not None:
            extra["max_blocks"] = int(self.max_blocks)
        if self.online_since is not None:
            extra["online_since"] = float(self.online_since)
        throughput = float(self.throughput)
        if not (math.isfinite(throughput) and throughput >= 0):
            raise ValueError(f"throughput must be finite and not negative, got {throughput}")
        return int(self.state), throughput, extra

    @classmethod
    def from_wire(cls, value: object, expiration: float = 0.0) -> ServerRecord:
        """Read a record that lives until ``expiration``; ValueError says which field makes it unusable."""
        if not isinstance(value, tuple | list) or len(value) < 2:
            raise ValueError("a server record is (state, throughput, extra)")
        extra = value[2] if len(value) > 2 else {}
        if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
            raise ValueError("extra must be a map with text keys")
        throughput = _number("throughput", value[1])
        if throughput is None:
            raise ValueError("throughput is missing")
        return cls(
            state=_state(value[0]),
            throughput=throughput,
            span=_span(_index("start_block", extra), _index("end_block", extra)),
            public_name=_text(extra.get("public_name")),
            version=_text(extra.get("version")),
            network_rps=_number("network_rps", extra.get("network_rps")),
            forward_rps=_number("forward_rps", extra.get("forward_rps")),
            inference_rps=_number("inference_rps", extra.get("inference_rps")),
            adapters=_names(extra.get("adapters", ())),
            torch_dtype=_text(extra.get("torch_dtype")),
            quant_type=_text(extra.get("quant_type")),
            using_relay=None if extra.get("using_relay") is None else bool(extra["using_relay"]),
            cache_tokens_left=_index("cache_tokens_left", extra, limit=2**62),
            max_blocks=_index("max_blocks", extra),
            online_since=_number("online_since", extra.get("online_since")),
            next_pings=_pings(extra.get("next_pings")),
            expiration=expiration,
        )


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The entry of a public model under ``_petals.models``; dashboards read it."""

    num_blocks: int
    repository: str | None = None

    def to_wire(self) -> dict[str, object]:
        return {"num_blocks": int(self.num_blocks), "repository": self.repository}

    @classmethod
    def from_wire(cls, value: object) -> ModelRecord:
        """ValueError names the field of what is no such entry."""
        if not isinstance(value, Mapping):
            raise ValueError(f"the entry must be a map, got {type(value).__name__}")
        num_blocks = _index("num_blocks", value, limit=MAX_MODEL_BLOCKS)
        if not num_blocks:
            raise ValueError("num_blocks must be at least 1")
        return cls(num_blocks, _text(value.get("repository")))


def _rate(name: str, value: float | None) -> float | None:
    """Rates go out as finite positive floats: clients divide by them."""
    if value is None:
        return None
    rate = float(value)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"{name} must be finite and positive, got {rate}")
    return rate


def _state(value: object) -> ServerState:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"state must be 0, 1 or 2, got {value!r}")
    return ServerState(value)


def _number(name: str, value: object) -> float | None:
    """Strict as the reference: a float, finite, not negative; None stays None."""
    if value is None:
        return None
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite float >= 0, got {value!r}")
    return value


def _index(name: str, extra: Mapping[str, object], limit: int = _MAX_BLOCKS) -> int | None:
    value = extra.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")
    return value


def _span(start: int | None, end: int | None) -> BlockSpan | None:
    """Both ends or nothing; an empty or reversed claim is no claim."""
    if start is None or end is None or start >= end:
        return None
    return BlockSpan(start, end)


def _text(value: object) -> str | None:
    """Informational fields: anything is turned into short text."""
    if value is None:
        return None
    return (value if isinstance(value, str) else shortened(value))[:_MAX_TEXT]


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list):
        raise ValueError(f"adapters must be a list of names, got {type(value).__name__}")
    return tuple(_text(name) or "" for name in value)


def _pings(value: object) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"next_pings must be a map, got {type(value).__name__}")
    for peer, rtt in value.items():
        if not isinstance(peer, str) or not isinstance(rtt, float) or not rtt >= 0:
            raise ValueError(f"next_pings[{peer!r}] must be a float >= 0, got {rtt!r}")
    return dict(value)
