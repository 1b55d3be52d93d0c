"""The parts of a run on a GPU, one after the other; what each found, and what was left out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from subprocess import SubprocessError

from benchmarks.benchmark import say
from benchmarks.gpu import attention_cases, block_cases, case, expert_cases, others, small_cases
from benchmarks.gpu.block_cases import Capture, Model
from benchmarks.gpu.cards import ATTENTION_CONTEXT, SHAPES, Shape
from benchmarks.gpu.case import Case, Site
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.roofline import BATCHES, BITS
from benchmarks.gpu.verdict import STEP
from benchmarks.report import PETALS, TRANSFORMERS, Row, describe_setting
from benchmarks.timing import summarize

SPAN_BLOCKS = 8
_SPAN_BATCHES = BATCHES[:2]  # more rows of keys and values than small cards have room for


@dataclass(slots=True)
class Bench:
    """Where and how is measured, whether all parts are, and what was left out so far."""

    site: Site
    clock: Clock
    capture: Capture
    is_whole: bool = True
    skipped: list[str] = field(default_factory=list)

    def skip(self, what: str, why: object) -> None:
        self.skipped.append(f"{what}: {why}")
        say(f"  skipped {self.skipped[-1]}")


def kernels(bench: Bench, shape: Shape = SHAPES[0]) -> Iterator[Row]:
    yield from kernel_rows(bench, attention_cases.cases(bench.site, shape))
    yield from kernel_rows(bench, small_cases.cases(bench.site, shape))
    yield from kernel_rows(bench, expert_cases.cases(bench.site))


def kernel_rows(bench: Bench, cases: Iterable[Case]) -> Iterator[Row]:
    for each in cases:
        say(f"  {each.kernel} {describe_setting(each.setting)}")
        for reason in each.skipped:
            bench.skip(each.kernel, reason)
        yield from case.measure(each, bench.site, bench.clock)
        gc.collect()


def blocks(bench: Bench, shapes: Iterable[Shape] = SHAPES) -> Iterator[Row]:
    for shape in shapes:
        for weights in BITS:
            yield from block_rows(bench, shape, weights)
        yield from rival_rows(bench, shape)


def block_rows(bench: Bench, shape: Shape, weights: str) -> Iterator[Row]:
    """Steps of one block and of a span, and the parity of its replays."""
    site = bench.site
    context = ATTENTION_CONTEXT // site.scale
    span = Model.draw(site, shape, weights, SPAN_BLOCKS)
    facts = {"model": shape.name, "weights": weights, "context": context}
    for rows in BATCHES:
        setting = {**facts, "rows": rows}
        say(f"  block {describe_setting(setting)}")
        step = block_cases.make_step(site, span.first(1), rows, context)
        yield from block_cases.measure(step, setting, bench.clock, site.samples)
        gc.collect()
    for rows in _SPAN_BATCHES:
        setting = {**facts, "rows": rows, "blocks": SPAN_BLOCKS}
        say(f"  span {describe_setting(setting)}")
        step = block_cases.make_step(site, span, rows, context)
        yield block_cases.measure_span(step, setting, bench.clock, site.samples)
    yield block_cases.check_parity(step, {"check": "replays", **setting}, bench.capture)


def rival_rows(bench: Bench, shape: Shape) -> Iterator[Row]:
    """transformers' layer and stock Petals' block at the settings of our dense one."""
    site = bench.site
    context = ATTENTION_CONTEXT // site.scale

    def by_transformers() -> list[list[float]]:
        steps = (others.transformers_step(site, shape, rows, context) for rows in BATCHES)
        return [bench.clock.seconds(step, site.samples, is_replayed=False) for step in steps]

    measures: Mapping[str, Callable[[], list[list[float]]]] = {
        TRANSFORMERS: by_transformers,
        PETALS: lambda: others.petals_seconds(site, shape, BATCHES, context),
    }
    for provider, measure in measures.items():
        say(f"  {provider} model={shape.name}")
        try:
            found = measure()
        except (RuntimeError, OSError, ValueError, SubprocessError) as error:  # other programs, other needs
            bench.skip(f"{provider}, {shape.name}", str(error).partition("\n")[0])
            continue
        for rows, seconds in zip(BATCHES, found, strict=True):
            setting = {"model": shape.name, "weights": "bfloat16", "context": context, "rows": rows}
            samples = summarize([1e6 * each for each in seconds])
            for mode in ("launched", "replayed"):  # what ours is held against in both
                yield Row(provider, {**setting, "mode": mode}, STEP, "us", samples)
        gc.collect()


PARTS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {"kernels": kernels, "blocks": blocks}


def run(bench: Bench, names: Iterable[str]) -> list[Row]:
    """The rows of these parts."""
    rows: list[Row] = []
    for name in names:
        say(f"{name}:")
        rows += PARTS[name](bench)
    return rows
