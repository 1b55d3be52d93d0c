"""Stock Petals 2.2.0.post1, run in its own environment: servers, and jobs that use its client."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petalsd.types import BlockSpan
from tests.interop.child import Child

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-petals" / "bin" / "python"
JOBS = Path(__file__).resolve().parent / "petals_side"

START_DEADLINE_S = 90.0
JOB_DEADLINE_S = 100.0
# One thread per process: servers, client and test share few cores. The proxy that refuses keeps the question
# for newer releases, which Petals asks at every start, from leaving the machine.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
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
    """What a stock server is started with; ``directory`` keeps its identity and its log."""

    model: Path
    directory: Path
    dht_prefix: str
    span: BlockSpan
    initial_peers: Sequence[str] = ()
    dtype: str = "float32"
    num_handlers: int = 2

    def command(self) -> list[str]:
        swarm = ["--initial_peers", *self.initial_peers] if self.initial_peers else ["--new_swarm"]
        return [
            str(PYTHON), "-m", "petals.cli.run_server", str(self.model),
            *swarm,
            "--dht_prefix", self.dht_prefix,
            "--block_indices", str(self.span),
            "--identity_path", str(self.directory / "identity"),
            "--host_maddrs", "/ip4/127.0.0.1/tcp/0",
            "--device", "cpu",
            "--torch_dtype", self.dtype,
            "--throughput", "10",
            "--num_handlers", str(self.num_handlers),
            "--skip_reachability_check",
            "--no_auto_relay",
        ]  # fmt: skip


@contextmanager
def stock_server(options: ServerOptions) -> Iterator[list[str]]:
    """Run a stock server until the block ends; yields its multiaddresses once it computes."""
    options.directory.mkdir(parents=True, exist_ok=True)
    with Child(options.command(), options.directory / "server.log", ENVIRONMENT) as child:
        running = child.wait_for(r"Running a server on (\[.*\])", START_DEADLINE_S)
        child.wait_for(r"\[INFO\] Started$", START_DEADLINE_S)
        yield list(ast.literal_eval(running[1]))


def run_job(
    name: str, directory: Path, deadline_s: float = JOB_DEADLINE_S, **arguments: Any
) -> dict[str, Any]:
    """Run ``petals_side/<name>.py`` with JSON arguments; return its JSON result. Its log stays behind."""
    command = [str(PYTHON), str(JOBS / f"{name}.py"), json.dumps(arguments, default=str)]
    with Child(command, directory / f"{name}.log", ENVIRONMENT) as child:
        result: dict[str, Any] = json.loads(child.wait_for(r"^result (\{.*\})$", deadline_s)[1])
    return result
