"""The servers that are compared: each a context manager that yields a running Provider and ends its processes."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.report import OURS, PETALS
from petalsd.types import BlockSpan
from tests.interop import stock
from tests.interop.child import Child
from tests.interop.daemon import DaemonOptions, petalsd_daemon
from tests.interop.petals_model import make_petals_copy

DHT_PREFIX = "benchmark-hf"
START_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Job:
    """What every provider is asked to serve: ``span`` of ``model`` in ``dtype``, on ``threads`` CPU threads."""

    model: Path
    span: BlockSpan
    threads: int
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Provider:
    """A server that answers at ``maddr`` and serves ``job``; ``directory`` is for its and its clients' files."""

    name: str
    maddr: str
    job: Job
    directory: Path

    @property
    def uid(self) -> str:
        """All served blocks, as a client asks for them."""
        return " ".join(f"{DHT_PREFIX}.{block}" for block in self.job.span)

    @property
    def hidden_size(self) -> int:
        config: dict[str, Any] = json.loads((self.job.model / "config.json").read_text())
        return int(config["hidden_size"])

    @property
    def swarm(self) -> dict[str, Any]:
        """How the stock client is told of the server."""
        model = make_petals_copy(self.job.model, self.directory / "client-model")
        return {"model": str(model), "initial_peers": [self.maddr], "dht_prefix": DHT_PREFIX}


@contextmanager
def echo(job: Job, directory: Path) -> Iterator[Provider]:
    command = [sys.executable, "-m", "benchmarks.echo_server"]
    with Child(command, directory / "echo.log") as child:
        maddr = child.wait_for(r"^online (\S+)$", START_DEADLINE_S)[1]
        yield Provider("echo", maddr, job, directory)


def petals_options(job: Job, directory: Path) -> stock.ServerOptions:
    """Makes the copy of the model that it reads."""
    return stock.ServerOptions(
        model=make_petals_copy(job.model, directory / "model"),
        directory=directory,
        dht_prefix=DHT_PREFIX,
        span=job.span,
        dtype=job.dtype,
        threads=job.threads,
    )


def petalsd_options(job: Job, directory: Path) -> DaemonOptions:
    return DaemonOptions(
        model=job.model,
        directory=directory,
        dht_prefix=DHT_PREFIX,
        span=job.span,
        dtype=job.dtype,
        threads=job.threads,
    )


@contextmanager
def petals(job: Job, directory: Path) -> Iterator[Provider]:
    with stock.stock_server(petals_options(job, directory)) as maddrs:
        yield Provider(PETALS, maddrs[0], job, directory)


@contextmanager
def petalsd(job: Job, directory: Path) -> Iterator[Provider]:
    with petalsd_daemon(petalsd_options(job, directory)) as maddrs:
        yield Provider(OURS, maddrs[0], job, directory)


PROVIDERS: dict[str, Callable[[Job, Path], AbstractContextManager[Provider]]] = {
    "echo": echo,
    PETALS: petals,
    OURS: petalsd,
}


class Fleet:
    """Servers, and the stock client's process, that run until the context is left, so that they can take turns.

    What is asked for again is shared.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._providers: dict[tuple[str, Job], Provider] = {}
        self._directory = Path()
        self._stock_client: stock.StockClient | None = None

    def serve(self, names: Sequence[str], job: Job) -> list[Provider]:
        """A running server of each of these providers, in this order."""
        return [self._serve_one(name, job) for name in names]

    def _serve_one(self, name: str, job: Job) -> Provider:
        if (name, job) not in self._providers:
            directory = self._directory / f"{name}-{len(self._providers)}"
            directory.mkdir()
            self._providers[name, job] = self._stack.enter_context(PROVIDERS[name](job, directory))
        return self._providers[name, job]

    @property
    def stock_client(self) -> stock.StockClient:
        """One process of the stock client, for jobs in any of the swarms."""
        if self._stock_client is None:
            client = stock.StockClient(self._directory / "stock-client.log")
            self._stock_client = self._stack.enter_context(client)
        return self._stock_client

    def __enter__(self) -> Fleet:
        self._directory = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-servers-"))
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self._providers.clear()
        self._stock_client = None


def whole_model(model: Path, threads: int, dtype: str = "float32") -> Job:
    """All blocks of a model directory."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return Job(model, BlockSpan(0, config["num_hidden_layers"]), threads, dtype)
