"""Starting a server of the whole model: seconds from the command until it serves, and the memory that it has then.

The first start in a directory of its own, and later ones there, which find what the first one left. The memory is
the proportional set size of all its processes: what they share counts once. The files are in the page cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from benchmarks.benchmark import Benchmark, Options, say
from benchmarks.providers import Job, petals_options, petalsd_options, whole_model
from benchmarks.report import OURS, PETALS, Row
from benchmarks.timing import summarize
from tests.interop import stock
from tests.interop.child import Child
from tests.interop.daemon import running_daemon

LATER_STARTS = 3
START_S = 12.0
"""What one takes with its end: a round is not begun for which there is less time."""

Start = Callable[[], AbstractContextManager[tuple[Child, list[str]]]]


def run(options: Options) -> list[Row]:
    job, samples = whole_model(options.model, options.threads), Samples()
    starts = {name: prepare(name, job, options.directory / name) for name in options.servers}
    for number in range(1 if options.smoke else 1 + LATER_STARTS):
        if number > 1 and not options.has_time(f"later start {number}", START_S * len(starts)):
            break
        for name, start in starts.items():
            samples.take(name, "later" if number else "first", start)
    return samples.rows({"blocks": len(job.span), "threads": options.threads})


def prepare(name: str, job: Job, directory: Path) -> Start:
    """How a server starts, each time in the same directory."""
    directory.mkdir()
    if name == PETALS:
        return partial(stock.running_server, petals_options(job, directory))
    assert name == OURS
    return partial(running_daemon, petalsd_options(job, directory))


class Samples:
    """Seconds and bytes by provider and kind of start."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self._nbytes: dict[tuple[str, str], list[int]] = {}

    def take(self, name: str, setting: str, start: Start) -> None:
        begun = time.perf_counter()
        with start() as (child, _):
            seconds, nbytes = time.perf_counter() - begun, server_bytes(child.pid)
        self._seconds.setdefault((name, setting), []).append(seconds)
        self._nbytes.setdefault((name, setting), []).append(nbytes)
        say(f"  {name}, {setting} start: {seconds:.1f} s, {nbytes / 2**20:.0f} MiB")

    def rows(self, setting: dict[str, int | str]) -> list[Row]:
        rows = []
        for (name, kind), seconds in self._seconds.items():
            of_kind = {**setting, "start": kind}
            mib = [nbytes / 2**20 for nbytes in self._nbytes[name, kind]]
            rows.append(Row(name, of_kind, "time to serve", "s", summarize(seconds)))
            rows.append(Row(name, of_kind, "memory once it serves", "MiB", summarize(mib)))
        return rows


def server_bytes(root: int) -> int:
    """The proportional set size of a process, of all that descend from it, and of the rest of its group."""
    parents = {pid: parent_of(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))}
    return sum(pss_bytes(pid) for pid in parents if descends(pid, root, parents) or is_in(pid, root))


def descends(pid: int, root: int, parents: Mapping[int, int]) -> bool:
    """Itself included. A server's libp2p daemon has a session of its own, so that its group is not all."""
    for _ in parents:
        if pid == root:
            return True
        pid = parents.get(pid, 0)
    return False


def parent_of(pid: int) -> int:
    """0 for one that ended meanwhile."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # the name before may hold anything


def is_in(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


def pss_bytes(pid: int) -> int:
    """0 for one that ended meanwhile."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


BENCHMARK = Benchmark(
    "start", "a start until the server serves, first and later ones, and its memory", run, 40.0
)
