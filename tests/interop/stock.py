"""Stock Petals 2.2.0.post1, run in its own environment: servers, and a client that runs jobs."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petalsd.types import BlockSpan
from tests.interop.child import Child, ChildFailed

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-petals" / "bin" / "python"
_SCRIPTS = Path(__file__).resolve().parent / "petals_side"
WORKER, SERVER = _SCRIPTS / "worker.py", _SCRIPTS / "server.py"

START_DEADLINE_S = 90.0
JOB_DEADLINE_S = 100.0
# The proxy that refuses keeps Petals' question for newer releases, asked at every start, on this machine.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # servers, client and test share few cores
    "PYTHONWARNINGS": "ignore",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PETALS_MAX_RETRIES": "3",
}


def is_built() -> bool:
    return (PYTHON.parent.parent / "petalsd-inputs.sha256").exists()


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a stock server is started with; ``directory`` keeps its identity and its log.

    span              its blocks, or how many of its own choice
    balance_period_s  mean time between two looks at whether other blocks are better
    """

    model: Path
    directory: Path
    dht_prefix: str
    span: BlockSpan | int
    initial_peers: Sequence[str] = ()
    dtype: str = "float32"
    num_handlers: int = 2
    threads: int = 1
    balance_period_s: float = 60.0
    host_maddr: str = "/ip4/127.0.0.1/tcp/0"
    announce_maddrs: Sequence[str] = ()

    def command(self) -> list[str]:
        swarm = ["--initial_peers", *self.initial_peers] if self.initial_peers else ["--new_swarm"]
        announced = ["--announce_maddrs", *self.announce_maddrs] if self.announce_maddrs else []
        span = ["--num_blocks"] if isinstance(self.span, int) else ["--block_indices"]
        return [
            str(PYTHON), str(SERVER), str(self.model),
            *swarm,
            "--dht_prefix", self.dht_prefix,
            *span, str(self.span),
            "--mean_balance_check_period", str(self.balance_period_s),
            "--identity_path", str(self.directory / "identity"),
            "--host_maddrs", self.host_maddr,
            *announced,
            "--device", "cpu",
            "--torch_dtype", self.dtype,
            "--throughput", "10",
            "--num_handlers", str(self.num_handlers),
            "--skip_reachability_check",
            "--no_auto_relay",
        ]  # fmt: skip


def server_process(options: ServerOptions) -> Child:
    """A stock server that is not started yet."""
    options.directory.mkdir(parents=True, exist_ok=True)
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(options.threads)}
    return Child(options.command(), options.directory / "server.log", environment)


@contextmanager
def stock_server(options: ServerOptions) -> Iterator[list[str]]:
    """Run a stock server until the block ends; yields its multiaddresses once it computes."""
    with running_server(options) as (_, maddrs):
        yield maddrs


@contextmanager
def running_server(options: ServerOptions) -> Iterator[tuple[Child, list[str]]]:
    """The same, with the process."""
    with server_process(options) as child:
        running = child.wait_for(r"Running a server on (\[.*\])", START_DEADLINE_S)
        child.wait_for(r"\[INFO\] Started$", START_DEADLINE_S)
        yield child, list(ast.literal_eval(running[1]))


class StockClient:
    """A process of stock Petals that runs the jobs of petals_side/ one after another. Use as a context manager."""

    def __init__(self, log: Path) -> None:
        self._child = Child([str(PYTHON), str(WORKER)], log, ENVIRONMENT, has_input=True)
        self._last_id = 0

    def call(self, job: str, deadline_s: float = JOB_DEADLINE_S, **arguments: Any) -> dict[str, Any]:
        """Run one job; ChildFailed shows its traceback."""
        self._last_id += 1
        self._child.send_line(
            json.dumps({"id": self._last_id, "job": job, "arguments": arguments}, default=str)
        )
        match = self._child.wait_for(rf"^(answer|failed) {self._last_id}\b(.*)$", deadline_s)
        if match[1] == "failed":
            raise ChildFailed(f"{job} failed:\n{self._child.last_lines()}")
        answer: dict[str, Any] = json.loads(match[2])
        return answer

    @property
    def log(self) -> str:
        """All that it said."""
        return self._child.output()

    def __enter__(self) -> StockClient:
        self._child.start()
        self._child.wait_for("^ready$", START_DEADLINE_S)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._child.kill()
