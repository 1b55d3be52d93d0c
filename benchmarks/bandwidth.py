"""How fast this machine reads memory: the ceiling that a decode step is held against.

A pass sums a buffer of float32 in huge pages that is several times as large as the last-level cache, in pieces.
As STREAM does, the fastest counts, here the fastest piece of all passes: a slower one was disturbed, none can be
faster than the memory, for when its turn comes again the rest of the buffer has replaced it in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import time_call
from petalsd.ops.memory import empty

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST_BYTES = 256 << 20
_CACHE_MULTIPLE = 8
_MOST_BYTES = 1 << 30
_PASSES = 24
_PIECES = 4


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """GB/s (10^9 bytes) by number of threads, from reading ``buffer_bytes`` again and again."""

    gb_per_s: dict[int, float]
    buffer_bytes: int

    def of(self, threads: int) -> float:
        """The ceiling for ``threads`` threads: that of the nearest smaller number that was measured."""
        return self.gb_per_s[max(count for count in self.gb_per_s if count <= threads)]

    def __str__(self) -> str:
        figures = ", ".join(f"{rate:.1f} GB/s by {n} thread(s)" for n, rate in self.gb_per_s.items())
        return f"{figures}, over {self.buffer_bytes >> 20} MiB"


def measure_bandwidth(threads: int, passes: int = _PASSES, buffer_bytes: int | None = None) -> Bandwidth:
    """Measure 1 and ``threads`` threads; torch's number of threads is as before afterwards."""
    size = buffer_bytes or _buffer_bytes()
    buffer = empty([size // 4], torch.float32, torch.device("cpu")).fill_(1.0)
    pieces = buffer.split(len(buffer) // _PIECES)
    before = torch.get_num_threads()
    rates = {}
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            buffer.sum()
            seconds = min(time_call(piece.sum) for _ in range(passes) for piece in pieces)
            rates[count] = pieces[0].nbytes / seconds / 1e9
    finally:
        torch.set_num_threads(before)
    return Bandwidth(rates, size)


def _buffer_bytes() -> int:
    return min(_MOST_BYTES, max(_LEAST_BYTES, _CACHE_MULTIPLE * last_level_cache_bytes()))


def last_level_cache_bytes() -> int:
    """The largest cache of the first processor; 0 where the kernel does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [file.read_text().strip() for file in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)
