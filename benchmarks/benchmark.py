"""What a benchmark is, and what it is told: the contract between the files of suite/ and the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.providers import Fleet, Job, Provider, whole_model
from benchmarks.report import OURS, PETALS, Row
from benchmarks.timing import Pace
from petalsd.types import BlockSpan


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One entry of the suite: a file in suite/ that assigns one of these to ``BENCHMARK``.

    name          of the results' files, and what ``--only`` takes
    description   one line: what one sample is
    run           measures, in about ``budget_s`` seconds (twice that with ``compare``), and returns the rows
    """

    name: str
    description: str
    run: Callable[[Options], list[Row]]
    budget_s: float


@dataclass(slots=True)
class Options:
    """What a run is asked for.

    model      directory of a llama model in Hugging Face format; all blocks of it are measured
    directory  for scratch files; removed after the run
    fleet      starts servers, and ends them after the run
    threads    CPU threads of each server, and the most that work in this process gets
    compare    also measure stock Petals, and transformers wherever it computes the same
    smoke      only show that everything works: the fewest repetitions of the smallest settings
    """

    model: Path
    directory: Path
    fleet: Fleet
    threads: int
    compare: bool = False
    smoke: bool = False
    deadline: float = float("inf")
    skipped: list[str] = field(default_factory=list)

    @property
    def pace(self) -> Pace:
        """For work in this process."""
        return Pace(1, 0.0) if self.smoke else Pace(3, 0.25)

    def serve(self, dtype: str = "float32") -> list[Provider]:
        """Servers of the whole model."""
        return self.fleet.serve(self.servers, whole_model(self.model, self.threads, dtype))

    def serve_block(self, model: Path, names: Sequence[str], dtype: str = "float32") -> list[Provider]:
        """Servers of the first block of ``model``; a smoke run shares those of the whole small model instead."""
        job = Job(model, BlockSpan(0, 1), self.threads, dtype)
        return self.fleet.serve(names, whole_model(self.model, self.threads) if self.smoke else job)

    @property
    def servers(self) -> list[str]:
        """The providers of a comparison of servers."""
        return [PETALS, OURS] if self.compare else [OURS]

    @property
    def remaining_s(self) -> float:
        """Until this benchmark should be done."""
        return self.deadline - time.monotonic()

    def skip(self, what: str, why: str) -> None:
        """Leave something out, and say so in the results."""
        self.skipped.append(f"{what}: {why}")
        say(f"  skipped {self.skipped[-1]}")

    def has_time(self, what: str, needed_s: float = 0.0) -> bool:
        """Whether ``needed_s`` more seconds are left; where not, ``what`` counts as skipped."""
        if self.remaining_s >= needed_s:
            return True
        self.skip(what, "no time left")
        return False


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
