"""petalsd daemons as their users start them: `petalsd run` with a file, watched through the JSON log."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from petalsd.types import BlockSpan
from tests.forked import ForkedProcess, fork_petalsd
from tests.interop.child import Child

START_DEADLINE_S = 90.0
_PROGRAM = (sys.executable, "-m", "petalsd")
_ONLINE = r'^\{.*"event": ?"online".*\}$'
_BOOTSTRAP = r'^\{.*"event": ?"bootstrap_node_started".*\}$'
_MOVED = r'^\{.*"event": ?"moved".*\}$'


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What a daemon serves; ``directory`` keeps its configuration, identity and log.

    span    its blocks, or how many of its own choice
    others  more keys of the configuration, by section
    """

    model: Path
    directory: Path
    dht_prefix: str
    span: BlockSpan | int
    initial_peers: Sequence[str] = ()
    dtype: str = "float32"
    threads: int = 1
    others: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.directory / "petalsd.toml"

    def toml(self) -> str:
        sections: dict[str, dict[str, object]] = {
            "model": {"source": str(self.model), "dht_prefix": self.dht_prefix, "dtype": self.dtype},
            "blocks": {"count": self.span} if isinstance(self.span, int) else {"span": str(self.span)},
            "swarm": {
                "initial_peers": list(self.initial_peers),
                "host_maddrs": ["/ip4/127.0.0.1/tcp/0"],
                "identity_path": str(self.directory / "identity"),
                "throughput": 10.0,
            },
            "engine": {"device": "cpu", "threads": self.threads},
            "control": {"socket": str(self.directory / "control.sock")},
            "daemon": {"drain_deadline_s": 0.0, "log_format": "json"},
        }
        lines = []
        for name, section in sections.items():
            keys = {**section, **self.others.get(name, {})}
            lines.append(f"[{name}]")
            # Strings, numbers and lists of strings look the same in TOML as in JSON.
            lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        return "\n".join(lines) + "\n"


class ForkedDaemon(Child):
    """The same command in a process that has its imports behind it; where nothing is measured."""

    def _spawn(self, log: int) -> ForkedProcess:
        return fork_petalsd(self.command[len(_PROGRAM) :], self.environment, log, is_group=True)


def daemon_process(options: DaemonOptions, kind: type[Child] = Child) -> Child:
    """A daemon that is not started yet."""
    options.directory.mkdir(parents=True, exist_ok=True)
    options.file.write_text(options.toml())
    command = [*_PROGRAM, "run", "--config", str(options.file)]
    homes = dict.fromkeys(("XDG_STATE_HOME", "XDG_CACHE_HOME"), str(options.directory))
    environment = {**homes, "OMP_NUM_THREADS": str(options.threads)}
    return kind(command, options.directory / "daemon.log", environment)


@contextmanager
def petalsd_daemon(options: DaemonOptions, kind: type[Child] = Child) -> Iterator[list[str]]:
    """Run a daemon until the block ends; yields its multiaddresses once it is online. It must stop in order."""
    with running_daemon(options, kind) as (_, maddrs):
        yield maddrs


@contextmanager
def running_daemon(options: DaemonOptions, kind: type[Child] = Child) -> Iterator[tuple[Child, list[str]]]:
    """The same, with the process."""
    child = daemon_process(options, kind)
    child.start()
    try:
        yield child, json.loads(child.wait_for(_ONLINE, START_DEADLINE_S)[0])["maddrs"]
    except BaseException:
        child.kill()
        raise
    code = child.stop(signal.SIGTERM)
    assert code == 0, f"stopped with {code}:\n{child.last_lines()}"


@contextmanager
def bootstrap_node(directory: Path) -> Iterator[list[str]]:
    """A node without blocks that others join through; yields its multiaddresses."""
    directory.mkdir(parents=True, exist_ok=True)
    words = ["--set=daemon.role=bootstrap", "--set=swarm.host_maddrs=/ip4/127.0.0.1/tcp/0"]
    file = directory / "boot.toml"
    file.write_text(f'[control]\nsocket = "{directory / "boot.sock"}"\n')
    child = ForkedDaemon(
        [*_PROGRAM, "run", "--config", str(file), *words],
        directory / "boot.log",
        {"XDG_STATE_HOME": str(directory)},
    )
    child.start()
    try:
        yield json.loads(child.wait_for(_BOOTSTRAP, START_DEADLINE_S)[0])["maddrs"]
    finally:
        child.stop(signal.SIGTERM)


def move(daemon: Child, options: DaemonOptions, span: BlockSpan) -> None:
    """Have a daemon that was started with ``options`` serve other blocks; returns when it does."""
    options.file.write_text(replace(options, span=span).toml())
    daemon.send(signal.SIGHUP)
    daemon.wait_for(_MOVED, START_DEADLINE_S)
