"""Operations of the KV pool's books, which every engine iteration does: nanoseconds per call, in one thread.

The pool has the size of a server's default for 30 blocks and holds 32 sessions of 256 tokens. No keys or values
are touched: this is what the engine adds to its kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import PAGE_TOKENS
from benchmarks.report import OURS, Row
from benchmarks.timing import summarize
from petalsd._C import PagePool
from petalsd.kvcache.sizing import pages_for

NUM_BLOCKS = 30
KV_TOKENS = 16384
SESSIONS = 32
CONTEXT = 256
BEAMS = 4
ROUNDS = 50
CALLS = 200


def run(options: Options) -> list[Row]:
    rounds, calls = (2, 2) if options.smoke else (ROUNDS, CALLS)
    setting = {"blocks": NUM_BLOCKS, "sessions": SESSIONS, "context": CONTEXT}
    samples: dict[str, list[float]] = {}
    operations = make_operations()
    for _ in range(rounds):
        for name, operation in operations.items():
            samples.setdefault(name, []).append(_ns_per_call(operation, calls))
    return [Row(OURS, setting, name, "ns", summarize(values)) for name, values in samples.items()]


def make_operations() -> Mapping[str, Callable[[], object]]:
    """Each leaves the pool as it found it, and counts what it does in one call."""
    pool = PagePool(pages_for(KV_TOKENS, NUM_BLOCKS, PAGE_TOKENS), PAGE_TOKENS)
    handles = [pool.try_open(0, NUM_BLOCKS, 1, CONTEXT + PAGE_TOKENS) for _ in range(SESSIONS)]
    for handle in handles:
        pool.extend(handle, CONTEXT)
    beams = pool.try_open(0, NUM_BLOCKS, BEAMS, CONTEXT)
    pool.extend(beams, CONTEXT)
    table = np.empty((SESSIONS, CONTEXT // PAGE_TOKENS + 1), dtype=np.int32)
    one, rotated = handles[0], [*range(1, BEAMS), 0]

    def grow_and_roll_back() -> None:
        pool.extend(one, CONTEXT + 1)
        pool.truncate(one, CONTEXT)

    def open_and_close() -> None:
        pool.close(pool.try_open(0, NUM_BLOCKS, 1, CONTEXT))

    return {
        "extend within a page": lambda: pool.extend(one, CONTEXT),
        "extend by a page and truncate": grow_and_roll_back,
        f"fill_origins of {SESSIONS} rows": lambda: pool.fill_origins(handles, table),
        f"reorder {BEAMS} rows": lambda: pool.reorder(beams, rotated),
        "take_copies of none": lambda: pool.take_copies(1024),
        "open and close": open_and_close,
    }


def _ns_per_call(operation: Callable[[], object], calls: int) -> float:
    started = time.perf_counter_ns()
    for _ in range(calls):
        operation()
    return (time.perf_counter_ns() - started) / calls


BENCHMARK = Benchmark("pool_operations", "bookkeeping of the KV pool in C++, nanoseconds per call", run, 5.0)
