"""One decode step through all blocks, in this process: 1 to 32 sessions behind short and long contexts.

petalsd in every format that it loads, beside transformers on the same weights. What a step must read at least are
the weights once, and the keys and values of every session.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import (
    REFERENCE_FORMATS,
    LocalModel,
    ReferenceModel,
    available_bytes,
    formats,
    load_models,
    thread_counts,
)
from benchmarks.report import OURS, TRANSFORMERS, Row, describe_setting
from benchmarks.timing import Work, summarize, take_turns

SESSIONS = (1, 8, 16, 32)
CONTEXTS = (16, 256, 2048, 8192)
MAIN_CONTEXT = 256
GRID_FORMAT = "bfloat16"

# transformers concatenates its whole cache at each step: beyond this, one step takes seconds.
_REFERENCE_KV_BYTES = 400 << 20
_MEMORY_SHARE = 3  # of what is available a cache may take one part in this many


@dataclass(frozen=True, slots=True)
class Case:
    """One setting; ``with_reference`` also measures transformers."""

    sessions: int
    context: int
    threads: int
    with_reference: bool

    def setting(self, kind: str) -> dict[str, int | str]:
        return {
            "format": kind, "sessions": self.sessions, "context": self.context, "threads": self.threads,
        }  # fmt: skip


def plan(options: Options) -> Iterator[tuple[str, Case]]:
    """Formats and cases, those first that must not be missed when time is short.

    The middle context in every format, then the other contexts in one of them, and last all threads.
    """
    if options.smoke:
        yield from ((kind, Case(2, 16, 1, kind in REFERENCE_FORMATS)) for kind in formats())
        return
    kinds = sorted(formats(), key=lambda kind: kind != GRID_FORMAT)
    for kind, sessions in product(kinds, SESSIONS):
        yield kind, Case(sessions, MAIN_CONTEXT, 1, kind in REFERENCE_FORMATS)
    for sessions, context in product(SESSIONS, CONTEXTS):
        if context != MAIN_CONTEXT:
            yield GRID_FORMAT, Case(sessions, context, 1, options.compare)
    for threads in list(thread_counts(options.threads))[1:]:
        for kind, sessions in product(kinds, (1, SESSIONS[-1])):
            yield kind, Case(sessions, MAIN_CONTEXT, threads, kind in REFERENCE_FORMATS)


def run(options: Options) -> list[Row]:
    models = {kind: load_models(options.model, kind) for kind in formats()}
    rows = []
    for kind, case in plan(options):
        what = describe_setting(case.setting(kind))
        if options.has_time(what) and _fits(models[kind][0], case, what, options):
            rows += measure(*models[kind], case, options)
        gc.collect()  # a cache of gigabytes must be gone before the next one
    return rows


def measure(model: LocalModel, reference: ReferenceModel | None, case: Case, options: Options) -> list[Row]:
    """Milliseconds of each provider's steps, taken in turns."""
    works: dict[str, Work] = {OURS: model.step(case.sessions, case.context, 1, case.threads)}
    kv_bytes = model.kv_bytes(case.sessions, case.context)
    if reference is not None and case.with_reference:
        if kv_bytes <= _REFERENCE_KV_BYTES:
            works[TRANSFORMERS] = reference.step(case.sessions, case.context, 1, case.threads)
        else:
            options.skip(f"transformers at {kv_bytes / 1e9:.1f} GB of keys and values", "seconds per step")
    setting = case.setting(model.format)
    nbytes = round(model.model_bytes) + kv_bytes
    return [
        Row(name, setting, "decode step", "ms", summarize([1e3 * each for each in seconds]), nbytes)
        for name, seconds in take_turns(works, options.pace).items()
    ]


def _fits(model: LocalModel, case: Case, what: str, options: Options) -> bool:
    needed, available = model.kv_bytes(case.sessions, case.context), available_bytes()
    if needed <= available // _MEMORY_SHARE:
        return True
    options.skip(what, f"its cache takes {needed / 1e9:.1f} of {available / 1e9:.1f} GB")
    return False


BENCHMARK = Benchmark(
    "decode_step",
    "one decode step through all blocks in this process, without engine and network",
    run,
    70.0,
)
