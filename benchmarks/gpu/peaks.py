"""What the card itself can do: the ceilings that kernels are held against."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from benchmarks.gpu.case import Site
from benchmarks.gpu.clock import Clock

COPY_BYTES = 1 << 30
MATRIX_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Peaks:
    """GB/s (10^9 bytes) of a large copy, and TFLOP/s of a large product in the site's dtype."""

    gb_per_s: float
    tflops: float


def measure_peaks(site: Site, clock: Clock, copy_bytes: int = COPY_BYTES, size: int = MATRIX_SIZE) -> Peaks:
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=site.device)
    target = torch.empty_like(source)
    copying = statistics.median(clock.seconds(lambda: target.copy_(source), site.samples))
    a, b = site.randn(size, size), site.randn(size, size)
    c = torch.empty_like(a)
    multiplying = statistics.median(clock.seconds(lambda: torch.mm(a, b, out=c), site.samples))
    return Peaks(2 * copy_bytes / copying / 1e9, 2 * size**3 / multiplying / 1e12)
