"""What the card itself can do: the ceilings that kernels are held against."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from benchmarks.gpu.case import Site
from benchmarks.gpu.clock import Clock

COPY_BYTES = 2 << 30
MATRIX_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Peaks:
    """GB/s (10^9 bytes) of reading and writing much memory, and TFLOP/s of a large product in the site's dtype."""

    gb_per_s: float
    tflops: float


def measure_peaks(site: Site, clock: Clock, copy_bytes: int = COPY_BYTES, size: int = MATRIX_SIZE) -> Peaks:
    bandwidth = _bandwidth(site, clock, copy_bytes)
    a, b = site.randn(size, size), site.randn(size, size)
    c = torch.empty_like(a)
    multiplying = statistics.median(clock.seconds(lambda: torch.mm(a, b, out=c), site.samples))
    return Peaks(bandwidth, 2 * size**3 / multiplying / 1e12)


def _bandwidth(site: Site, clock: Clock, copy_bytes: int) -> float:
    """The better one of reading and writing as much, and of reading alone.

    By kernels: what a captured graph copies goes another way, with two thirds of the bandwidth on an H200.
    """
    source = torch.ones(copy_bytes // 4, dtype=torch.float32, device=site.device)
    target, total = torch.empty_like(source), torch.empty((), device=site.device)
    copying = statistics.median(clock.seconds(lambda: torch.neg(source, out=target), site.samples))
    reading = statistics.median(clock.seconds(lambda: torch.sum(source, dim=0, out=total), site.samples))
    return max(2 * copy_bytes / copying, copy_bytes / reading) / 1e9
