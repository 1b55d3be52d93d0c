"""Which benchmarks start servers: their smoke tests share them, in a file of their own."""

from __future__ import annotations

SERVED = (
    "admission",
    "aggregate_decode",
    "chain",
    "generation",
    "interference",
    "move",
    "passes",
    "start",
    "step_latency",
)
