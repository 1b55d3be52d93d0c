"""A prompt through all blocks in this process, in one call: petalsd and transformers on the same weights."""

from __future__ import annotations

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import formats, load_models, thread_counts
from benchmarks.report import OURS, TRANSFORMERS, Row, describe_setting
from benchmarks.timing import Work, summarize, take_turns

PROMPTS = (256, 2048)


def run(options: Options) -> list[Row]:
    rows = []
    for kind in formats():
        model, reference = load_models(options.model, kind)
        for threads in [1] if options.smoke else thread_counts(options.threads):
            for tokens in (32,) if options.smoke else PROMPTS:
                setting = {"format": kind, "tokens": tokens, "threads": threads}
                if not options.has_time(describe_setting(setting)):
                    continue
                works: dict[str, Work] = {OURS: model.step(1, 0, tokens, threads)}
                if reference is not None:
                    works[TRANSFORMERS] = reference.step(1, 0, tokens, threads)
                for name, samples in take_turns(works, options.pace).items():
                    milliseconds = summarize([1e3 * seconds for seconds in samples])
                    rows.append(Row(name, setting, "prefill", "ms", milliseconds))
    return rows


BENCHMARK = Benchmark("prefill", "a prompt through all blocks in this process, in one call", run, 60.0)
