"""Runs the suite, one benchmark after the other, and writes results/ and the pictures of docs/.

    python -m benchmarks [--only NAME …] [--compare] [--smoke]
    python -m benchmarks --list | --summary | --plot

docs/benchmarks.md says what each measures and how to read it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks.plot import PICTURES, draw_all
from benchmarks.registry import find_benchmarks
from benchmarks.report import RESULTS, read_results
from benchmarks.runner import SuiteOptions, run_suite
from benchmarks.summary import summarize_results
from tests.interop import stock

DEMO_MODEL = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model"))
CORES = len(os.sched_getaffinity(0))
GRACE_S = 60.0  # for what was begun before the time was up
SMOKE_RESULTS = Path("build/bench-smoke")


def main() -> int:
    signal.signal(signal.SIGTERM, _give_up)
    options = parse_arguments()
    if options.list:
        for benchmark in find_benchmarks().values():
            print(f"{benchmark.name:<18} {benchmark.description}")
        return 0
    if options.summary:
        print(summarize_results(read_results(options.results)))
        return 0
    if not options.plot:
        check_inputs(options)
        suite = SuiteOptions(options.model, options.results, options.threads, options.compare, options.smoke)
        signal.signal(signal.SIGALRM, _give_up)
        signal.alarm(round(suite.limit_s + GRACE_S))
        if run_suite(suite, options.only):
            return 1
    if options.plot or not options.smoke:
        draw_all(read_results(options.results), options.pictures)
    return 0


def check_inputs(options: argparse.Namespace) -> None:
    """End with what to do when something that a run needs is not there."""
    if not (options.model / "config.json").exists():
        sys.exit(f"benchmarks: no model in {options.model}: run make demo-model, or name one with --model")
    if options.compare and not stock.is_built():
        sys.exit("benchmarks: --compare needs stock Petals in .venv-petals: make bench-compare builds it")


def _give_up(number: int, frame: object) -> NoReturn:
    """An exception in the main thread, so that the servers are ended on the way out."""
    sys.exit(f"benchmarks: ended by {signal.Signals(number).name}")


def parse_arguments() -> argparse.Namespace:
    names = list(find_benchmarks())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures petalsd on this machine; results in benchmarks/results.",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="see --list")
    parser.add_argument(
        "--compare", action="store_true", help="the same work on stock Petals (.venv-petals) and transformers"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="seconds each: shows that it works, measures nothing"
    )
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="a llama model's directory (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=CORES, help="CPU threads of each server (%(default)s)")
    parser.add_argument(
        "--results", type=Path, help=f"where results go ({RESULTS}, with --smoke {SMOKE_RESULTS})"
    )
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where pictures go (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="name the benchmarks and what each measures")
    what.add_argument(
        "--summary", action="store_true", help="a Markdown table of the last run's main figures"
    )
    what.add_argument("--plot", action="store_true", help="draw the last run's results again")
    options = parser.parse_args()
    if options.results is None:
        options.results = SMOKE_RESULTS if options.smoke else RESULTS
    return options


if __name__ == "__main__":
    sys.exit(main())
