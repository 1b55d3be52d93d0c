"""The one child process: hivemind's libp2p daemon, started so that it cannot outlive us."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import os
import secrets
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from hivemind.p2p import P2P, P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from petalsd.errors import SwarmError
from petalsd.swarm.calls import keep_books
from petalsd.swarm.ports import TAKEN_HINT, claimed_ports
from petalsd.swarm.protocol import MAX_UNARY_BYTES

log = structlog.get_logger(__name__)

# Asks the kernel to kill the daemon when the thread that started it ends, then becomes the daemon. The
# parent may have died before the request was in place, hence the look at its pid.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "os.getppid() == int(sys.argv[1]) or sys.exit('parent is gone')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
_IDLE_TIMEOUT_S = 30
_REAP_S = 0.2
_STOP_S = 3.0
_KEPT_LINES = 20


@dataclass(frozen=True, slots=True)
class P2PDOptions:
    """Command line of the daemon, in our words.

    listen       False makes it dial out only
    is_dialable  whether others can dial us: the daemon relays for others if so, and looks for relays if not; None:
                 it finds out, which takes minutes
    relays       multiaddrs of the peer to be reached through; without any it looks around for three minutes first,
                 and so it does where several peers are named and one of them does not answer
    """

    initial_peers: Sequence[str] = ()
    host_maddrs: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: Sequence[str] = ()
    identity_path: Path | None = None
    client_mode: bool = False
    listen: bool = True
    use_relay: bool = True
    use_auto_relay: bool = False
    is_dialable: bool | None = None
    relays: Sequence[str] = ()
    startup_timeout_s: float = 60.0

    def arguments(self, control_socket: Path) -> list[str]:
        """The flags of hivemind 1.1.12's p2pd."""
        is_loopback = all("/127.0.0.1/" in addr or "/ip6/::1/" in addr for addr in self.host_maddrs)
        flags: dict[str, object] = {
            "listen": f"/unix{control_socket}",
            "dhtClient" if self.client_mode else "dhtServer": 1,
            "autonat": 1,
            "autoRelay": int(self.use_auto_relay),
            "b": int(bool(self.initial_peers)),
            "connManager": 1,
            "idleTimeout": f"{_IDLE_TIMEOUT_S}s",
            "natPortMap": int(self.listen and not is_loopback),
            "relay": int(self.use_relay),
            "tls": 1,
            "persistentConnMaxMsgSize": MAX_UNARY_BYTES,
        }
        if self.is_dialable is not None:
            flags["forceReachabilityPublic" if self.is_dialable else "forceReachabilityPrivate"] = 1
        if self.relays:
            flags |= {"relayDiscovery": 0, "trustedRelays": ",".join(self.relays)}
        if self.initial_peers:
            flags["bootstrapPeers"] = ",".join(self.initial_peers)
        if self.listen:
            flags["hostAddrs"] = ",".join(self.host_maddrs)
        else:
            flags["noListenAddrs"] = 1
        if self.announce_maddrs:
            flags["announceAddrs"] = ",".join(self.announce_maddrs)
        if self.identity_path is not None:
            flags["id"] = self.identity_path
        return [f"-{name}={value}" for name, value in flags.items()]


class P2PDaemon:
    """Owns the child process and our connection to it (``p2p``)."""

    def __init__(self, options: P2PDOptions) -> None:
        self._options = options
        self._socket = Path(tempfile.gettempdir()) / f"petalsd-p2pd-{secrets.token_hex(8)}.sock"
        self._child: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ready = asyncio.Event()
        self.p2p: P2P | None = None

    async def start(self) -> P2P:
        """Start the daemon and connect to it; SwarmError with its last words when it does not come up."""
        try:
            async with asyncio.timeout(self._options.startup_timeout_s):
                with claimed_ports(self._options.host_maddrs if self._options.listen else ()):
                    child = await self._spawn()
                    self._output = asyncio.create_task(self._read_output(child), name="p2pd output")
                    await self._until_ready(self._output)
                self.p2p = await P2P.replicate(Multiaddr(f"/unix{self._socket}"))
                keep_books(self.p2p)
        except (TimeoutError, OSError, P2PDaemonError) as error:
            await self.stop()
            raise self._failure(error) from error
        except BaseException:
            await self.stop()
            raise
        return self.p2p

    async def stop(self) -> None:
        """End the connection and the process; idempotent."""
        p2p, self.p2p = self.p2p, None
        if p2p is not None:
            tasks = _connection_tasks(p2p)
            await p2p.shutdown()
            await asyncio.gather(*tasks, return_exceptions=True)
        child, self._child = self._child, None
        if child is not None:
            await _end(child)
        if self._output is not None:
            self._output.cancel()
            await asyncio.gather(self._output, return_exceptions=True)
            self._output = None
        self._socket.unlink(missing_ok=True)

    @property
    def is_alive(self) -> bool:
        """Whether the process and our connection to it are there; one that hangs counts."""
        if self._child is None or self._child.returncode is not None or self.p2p is None:
            return False
        return not any(task.done() for task in _connection_tasks(self.p2p))

    async def until_dead(self) -> str:
        """Wait until the daemon or our connection to it is gone by itself; the reason."""
        if self._child is None or self._output is None or self.p2p is None:
            return "the libp2p daemon is not running"
        exited = asyncio.ensure_future(self._child.wait())
        try:
            await asyncio.wait({exited, *_connection_tasks(self.p2p)}, return_when=asyncio.FIRST_COMPLETED)
            # The connection of a process that died ends first, now and then: say what was the cause.
            await asyncio.wait({exited}, timeout=_REAP_S)
            return (
                "the libp2p daemon exited" if exited.done() else "the connection to the libp2p daemon broke"
            )
        finally:
            exited.cancel()

    async def _spawn(self) -> asyncio.subprocess.Process:
        binary = str(importlib.resources.files("hivemind.hivemind_cli") / "p2pd")
        self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-ISc",
            _DIE_WITH_PARENT,
            str(os.getpid()),
            binary,
            *self._options.arguments(self._socket),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=child_environment(os.environ, len(os.sched_getaffinity(0))),
            start_new_session=True,  # a terminal's Ctrl-C is for us; we still have farewells to send
        )
        return self._child

    async def _until_ready(self, output: asyncio.Task[None]) -> None:
        ready = asyncio.ensure_future(self._ready.wait())
        try:
            await asyncio.wait({ready, output}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not self._ready.is_set():
            raise P2PDaemonError("it exited")

    async def _read_output(self, child: asyncio.subprocess.Process) -> None:
        while child.stdout is not None and (raw := await _read_line(child.stdout)):
            line = raw.decode(errors="replace").strip()
            self._lines.append(line)
            if line.startswith("Peer ID:"):
                self._ready.set()
            elif '"logger"' in line:
                log.debug("p2pd_message", message=_message(line))

    def _failure(self, error: Exception) -> SwarmError:
        waited = f"not up within {self._options.startup_timeout_s:g} s"
        reason = waited if isinstance(error, TimeoutError) else str(error)
        last = _message(self._lines[-1]) if self._lines else "it said nothing"
        if "bootstrap peers" in last:
            return SwarmError(
                f"cannot join the swarm through {', '.join(self._options.initial_peers)}: none can be reached",
                hint="check that one of the initial peers runs and that their addresses are right",
            )
        hint = "check swarm.host_maddrs, announce_maddrs, identity_path and initial_peers"
        if "address already in use" in last:
            hint = TAKEN_HINT
        return SwarmError(f"the libp2p daemon did not start: {reason}; its last words: {last}", hint=hint)


def _connection_tasks(p2p: P2P) -> list[asyncio.Task[None]]:
    """hivemind's tasks behind all unary calls. They end silently, and then no call is ever answered again."""
    control = getattr(getattr(p2p, "_client", None), "control", None)
    tasks = (getattr(control, name, None) for name in ("_read_task", "_write_task"))
    return [task for task in tasks if isinstance(task, asyncio.Task)]


async def _read_line(output: asyncio.StreamReader) -> bytes:
    """One line; an overlong one is skipped, for the daemon must never wait for a reader."""
    while True:
        try:
            return await output.readline()
        except ValueError:
            continue


async def _end(child: asyncio.subprocess.Process) -> None:
    for stop in (signal.SIGTERM, signal.SIGKILL):
        if child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            # Not by the child's own methods: they look whether it has ended and take its exit status from asyncio,
            # which then complains on a client's terminal. One that was stopped obeys only when it goes on.
            os.kill(child.pid, stop)
            os.kill(child.pid, signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await child.wait()


def child_environment(ours: Mapping[str, str], num_cores: int) -> dict[str, str]:
    """Only what the daemon needs: no tokens, no sockets of the service manager.

    It runs on half of the cores unless ``GOMAXPROCS`` says otherwise. Go wakes another thread for whatever it
    might do in parallel; on few cores that one takes the core from us just when a step has come, and moves no
    more bytes.
    """
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "GOMAXPROCS", "GODEBUG")
    environment = {name: ours[name] for name in kept if name in ours}
    environment.setdefault("GOMAXPROCS", str(max(1, num_cores // 2)))
    environment["GOLOG_LOG_LEVEL"] = ours.get("GOLOG_LOG_LEVEL", "error")
    environment["GOLOG_LOG_FMT"] = "json"
    return environment


def _message(line: str) -> str:
    with contextlib.suppress(ValueError, TypeError):
        record = json.loads(line)
        if isinstance(record, dict):
            return f"{record.get('msg', line)} {record.get('error', '')}".strip()
    return line
