"""The servers that are compared: each a context manager that yields a running Provider and ends its processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from petalsd.types import BlockSpan
from tests.interop import stock
from tests.interop.child import Child
from tests.interop.daemon import DaemonOptions, petalsd_daemon
from tests.interop.petals_model import make_petals_copy

DHT_PREFIX = "benchmark"
START_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Provider:
    """A server that answers at ``maddr``."""

    name: str
    maddr: str


@dataclass(frozen=True, slots=True)
class Job:
    """What every provider is asked to serve: ``span`` of ``model`` in float32, on ``threads`` CPU threads."""

    model: Path
    span: BlockSpan
    directory: Path
    threads: int


@contextmanager
def echo(job: Job) -> Iterator[Provider]:
    command = [sys.executable, "-m", "benchmarks.echo_server"]
    with Child(command, job.directory / "echo.log") as child:
        yield Provider("echo", child.wait_for(r"^online (\S+)$", START_DEADLINE_S)[1])


@contextmanager
def petals(job: Job) -> Iterator[Provider]:
    if not stock.is_built():
        sys.exit("stock Petals is not there: run tests/interop/environment/build.py, or name --providers")
    options = stock.ServerOptions(
        model=make_petals_copy(job.model, job.directory / "petals-model"),
        directory=job.directory / "petals",
        dht_prefix=DHT_PREFIX,
        span=job.span,
        threads=job.threads,
    )
    with stock.stock_server(options) as maddrs:
        yield Provider("petals-2.2", maddrs[0])


@contextmanager
def petalsd(job: Job) -> Iterator[Provider]:
    options = DaemonOptions(
        model=job.model,
        directory=job.directory / "petalsd",
        dht_prefix=DHT_PREFIX,
        span=job.span,
        threads=job.threads,
    )
    with petalsd_daemon(options) as maddrs:
        yield Provider("petalsd", maddrs[0])


PROVIDERS: dict[str, Callable[[Job], AbstractContextManager[Provider]]] = {
    "echo": echo,
    "petals": petals,
    "petalsd": petalsd,
}
