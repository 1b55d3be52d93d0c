"""The vocabulary every layer shares.

block    one transformer layer of the served model
span     contiguous ``[start, end)`` of blocks
page     KV unit: ``page_tokens`` tokens of one session row in one block
session  one client's inference stream, its pages and its position
step     one message of a session: ``n`` new positions of hidden states (prefill n > 1, decode n = 1)
batch    what the device runs at once: the ragged concatenation of steps
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass

_SPAN_TEXT = re.compile(r"(\d+):(\d+)")
_HOST_PORT_TEXT = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]]+)):(\d{1,5})")


@dataclass(frozen=True, slots=True, order=True)
class BlockSpan:
    """Blocks ``start`` to ``end - 1``. Never empty; raises ValueError otherwise."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a span needs 0 <= start < end, got {self.start}:{self.end}")

    @classmethod
    def parse(cls, text: str) -> BlockSpan:
        """Read ``"0:16"`` (end exclusive); ValueError says what is wrong."""
        match = _SPAN_TEXT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"a span is written start:end, for instance 0:16, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def covers(self, other: BlockSpan) -> bool:
        return self.start <= other.start and other.end <= self.end

    def first(self, most: int | None) -> BlockSpan:
        """The first ``most`` blocks, or all of them."""
        return self if most is None else BlockSpan(self.start, min(self.end, self.start + most))

    def minus(self, *others: BlockSpan) -> tuple[BlockSpan, ...]:
        """The runs of blocks that are in none of ``others``, ascending."""
        left = [block for block in self if not any(block in other for other in others)]
        starts = [block for block in left if block - 1 not in left]
        ends = [block + 1 for block in left if block + 1 not in left]
        return tuple(BlockSpan(start, end) for start, end in zip(starts, ends, strict=True))

    def hull(self, other: BlockSpan) -> BlockSpan:
        """The smallest span that holds both."""
        return BlockSpan(min(self.start, other.start), max(self.end, other.end))

    def intersect(self, other: BlockSpan) -> BlockSpan | None:
        """The common blocks, or None when there are none."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return BlockSpan(start, end) if start < end else None


@dataclass(frozen=True, slots=True)
class HostPort:
    """A network address to listen on; port 0 is any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> HostPort:
        """Read ``"127.0.0.1:9464"`` or ``"[::1]:9464"``; ValueError says what is wrong."""
        match = _HOST_PORT_TEXT.fullmatch(text.strip())
        if match is None or int(match[3]) > 65535:
            raise ValueError(f"an address is written host:port, for instance 127.0.0.1:9464, got {text!r}")
        return cls(match[1] or match[2], int(match[3]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class DaemonState(enum.Enum):
    """Life cycle of the daemon; ``daemon.lifecycle`` owns the transitions."""

    STARTING = "starting"
    LOADING = "loading"
    ONLINE = "online"
    REBALANCING = "rebalancing"
    DRAINING = "draining"
    DRAINED = "drained"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
