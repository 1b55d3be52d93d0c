"""A prompt through all blocks in this process, in one call: petalsd and transformers on the same weights."""

from __future__ import annotations

from itertools import product

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import LocalModel, ReferenceModel, formats, load_models, thread_counts
from benchmarks.report import OURS, TRANSFORMERS, Row, describe_setting
from benchmarks.timing import Work, summarize, take_turns

PROMPTS = (256, 2048)


def run(options: Options) -> list[Row]:
    models = {kind: load_models(options.model, kind) for kind in formats()}
    counts = [1] if options.smoke else thread_counts(options.threads)
    rows = []
    # Long prompts take seconds a call: they come last, when there may be no time left.
    for tokens, threads, kind in product((32,) if options.smoke else PROMPTS, counts, models):
        setting: dict[str, int | str] = {"format": kind, "tokens": tokens, "threads": threads}
        if options.has_time(describe_setting(setting)):
            rows += measure(*models[kind], setting, tokens, threads, options)
    return rows


def measure(
    model: LocalModel,
    reference: ReferenceModel | None,
    setting: dict[str, int | str],
    tokens: int,
    threads: int,
    options: Options,
) -> list[Row]:
    """Milliseconds of each provider's prefills, taken in turns."""
    works: dict[str, Work] = {OURS: model.step(1, 0, tokens, threads)}
    if reference is not None:
        works[TRANSFORMERS] = reference.step(1, 0, tokens, threads)
    return [
        Row(name, setting, "prefill", "ms", summarize([1e3 * each for each in seconds]))
        for name, seconds in take_turns(works, options.pace).items()
    ]


BENCHMARK = Benchmark("prefill", "a prompt through all blocks in this process, in one call", run, 50.0)
