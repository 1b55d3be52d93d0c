"""``python -m benchmarks.gpu``: measures the first GPU of this machine, and judges what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.benchmark import say

DIRECTORY = Path(__file__).resolve().parents[2] / "build" / "bench-gpu"
EXIT_WRONG = 1
EXIT_NO_GPU = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured, and nothing is wrong; 1: something is; 3: there is no GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.accept and options.only:
        parser.error("--accept is for whole runs: later ones are compared with what was measured in this one")
    if not torch.cuda.is_available():
        print(f"There is no GPU to measure: torch {torch.__version__} sees no CUDA device.")
        return EXIT_NO_GPU
    return _measure(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", choices=("kernels", "blocks"), help="measure this part alone")
    parser.add_argument("--samples", type=int, default=50, help="of each measurement")
    parser.add_argument("--results", type=Path, default=DIRECTORY, metavar="DIR", help="where the files go")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="append a Markdown table to this file")
    parser.add_argument("--accept", action="store_true", help="compare later runs with this one")
    return parser


def _measure(options: argparse.Namespace) -> int:
    # Late: these need Triton, which comes with torch for GPUs.
    from benchmarks import machine
    from benchmarks.gpu.cards import Card
    from benchmarks.gpu.case import Site
    from benchmarks.gpu.clock import CudaClock
    from benchmarks.gpu.outcome import accept, conclude, summary
    from benchmarks.gpu.peaks import measure_peaks
    from benchmarks.gpu.suite import PARTS, Bench, run
    from petalsd.engine.graphs import CudaGraphs

    device = torch.device("cuda:0")
    facts = torch.cuda.get_device_properties(device)
    clock, site = (
        CudaClock(device),
        Site(device, torch.bfloat16, facts.multi_processor_count, 1, options.samples),
    )
    peaks = measure_peaks(site, clock)
    card = Card(facts.name, peaks.gb_per_s, peaks.tflops, facts.multi_processor_count)
    say(f"{card.name}: {card.gb_per_s:.0f} GB/s, {card.tflops:.0f} TFLOP/s")
    bench = Bench(site, clock, CudaGraphs(device).capture, is_whole=options.only is None)
    with torch.inference_mode():
        rows = run(bench, [options.only] if options.only else PARTS)
    described = {**machine.describe(), "gpu": card.name, "cuda": str(torch.version.cuda)}
    outcome = conclude(card, rows, described, bench, options.results)
    if options.summary:
        with options.summary.open("a") as file:
            file.write(summary(outcome))
    for complaint in outcome.complaints:
        say(complaint)
    if options.accept:
        say(f"accepted: {accept(outcome, options.results)}")
        return 0
    return EXIT_WRONG if outcome.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
