"""Two network namespaces joined by a cable; the second lets nobody in, as behind a NAT. Root only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000
_OUTER, _INNER = "1.2.3.4", "1.2.3.9"  # as on the internet: libp2p treats private addresses in its own way
# Whoever is inside may begin a connection, nobody outside.
_CLOSED = """
table inet closed {
    chain input {
        type filter hook input priority 0; policy accept;
        iifname != "lo" tcp flags & (syn | ack) == syn drop
    }
}
"""


@dataclass(frozen=True, slots=True)
class Networks:
    """Names of the namespaces, and the outer one's address."""

    outer: str
    inner: str
    outer_address: str = _OUTER

    def inside(self, name: str) -> list[str]:
        """What a command begins with that runs in the namespace ``name``."""
        return ["ip", "netns", "exec", name]

    @contextlib.contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """Put the calling thread, and all threads and processes that it starts, there."""
        with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{name}") as theirs:
            enter_network(theirs.fileno())
            try:
                yield
            finally:
                enter_network(ours.fileno())


def missing() -> str:
    """Why there can be none here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    return f"needs {', '.join(absent)}" if absent else ""


@contextlib.contextmanager
def networks() -> Iterator[Networks]:
    made = Networks(f"outer-{os.getpid()}", f"inner-{os.getpid()}")
    try:
        for name in (made.outer, made.inner):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "link", "add", "eth0", "netns", made.outer, "type", "veth",
             "peer", "name", "eth0", "netns", made.inner)  # fmt: skip
        for name, address in ((made.outer, _OUTER), (made.inner, _INNER)):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
        _run(*made.inside(made.inner), "nft", "-f", "-", stdin=_CLOSED)
        yield made
    finally:
        for name in (made.outer, made.inner):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10, check=False)


def enter_network(fd: int) -> None:
    """The calling thread into the namespace that ``fd`` is open on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str, stdin: str | None = None) -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
