"""A real systemd as PID 1 in namespaces of its own, over an overlay of this machine's root.

The lab sees the machine's files and writes to a layer that is gone with it; its network is a loopback of its own.
It ends with the process that made it, however that ends, and after ``life_s`` at the latest. Real in it: units of
all kinds, readiness, watchdog, restarts, sandboxes, users, credentials, the journal. Not real: limits by cgroup
(``MemoryMax=`` is accepted and not enforced), udev, D-Bus.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tests.networks import enter_network
from tests.systemd.journal import Entry, Journal, parse_entries

MIN_SYSTEMD = 252
_BOOT_S = 60.0
_END_S = 20.0
_SYSTEMD = Path("/lib/systemd/systemd")
_TOOLS = ("unshare", "nsenter", "setpriv", "timeout", "mount", "systemctl", "journalctl")
_CAP_SYS_ADMIN = 21
_ENVIRON = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
            "LANG": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}  # fmt: skip


def missing() -> str | None:
    """What a lab needs and this machine or user lacks; None when there can be one."""
    if os.geteuid() != 0:
        return "a systemd of our own needs root"
    if not _effective_capabilities() >> _CAP_SYS_ADMIN & 1:
        return "a systemd of our own needs CAP_SYS_ADMIN (this container has none)"
    if lacking := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(lacking)}"
    if not _SYSTEMD.exists():
        return f"systemd is not installed ({_SYSTEMD})"
    version = _systemd_version()
    if version < MIN_SYSTEMD:
        return f"systemd {version} is older than {MIN_SYSTEMD}"
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlay file system"
    if own_cgroup() is None:
        return "cgroup v2 is not mounted"
    return None


class Lab:
    """Use as a context manager. Paths of its methods are paths inside.

    binds   directories of the host that shall be seen, read-only, under another name inside
    life_s  it ends by itself after this
    pid     of its systemd, as seen from outside; ``keeper_pid`` of the process that ends it and cleans up
    """

    def __init__(self, binds: Mapping[Path, str] | None = None, life_s: float = 900.0) -> None:
        self._binds = dict(binds or {})
        self._life_s = life_s
        self._keeper: subprocess.Popen[bytes] | None = None
        self._spawned: list[subprocess.Popen[str]] = []
        self.pid = 0
        self.keeper_pid = 0
        self.room = self.cgroup = Path()

    def __enter__(self) -> Lab:
        parent = own_cgroup()
        assert parent is not None, "missing() says so"
        self.room = Path(tempfile.mkdtemp(prefix="petalsd-lab-"))
        self.cgroup = parent / self.room.name
        (self.room / "stage").mkdir()
        # Closed again once systemd is up: it would block on a socket that nobody reads.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (self.room / "log").open("w+") as log:
            ready.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            ready.bind(str(self.room / "notify"))
            self._keeper = subprocess.Popen(self._boot_command(), stderr=log, stdin=subprocess.DEVNULL)
            self.keeper_pid = self._keeper.pid
            try:
                self.pid = _until_ready(ready, self.keeper_pid, log)
            except BaseException:
                self.end()
                raise
        self.run(["systemctl", "is-system-running", "--wait"], check=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End all that runs inside; returns when nothing of the lab is left. Idempotent."""
        for process in self._spawned:
            process.kill()
        if self._keeper is not None:
            self._keeper.terminate()
            self._keeper.wait(_END_S)
        for process in self._spawned:
            process.communicate(timeout=_END_S)
        self._spawned.clear()

    def path(self, inside: str) -> Path:
        """A file of the lab as seen from outside."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def copy(self, source: Path, inside: str) -> None:
        """A directory of the host with all that is in it, for everybody inside to read."""
        shutil.copytree(source, self.path(inside), dirs_exist_ok=True)
        self.run(["chmod", "-R", "a+rX", inside])

    def run(
        self, argv: Sequence[str], *, check: bool = True, timeout_s: float = 60.0, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or ``user``; AssertionError with its output when it fails."""
        done = subprocess.run(
            [*self._enter(user), *argv],
            capture_output=True, text=True, timeout=timeout_s, env=_ENVIRON, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def spawn(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command inside; to kill what is returned kills the command, and the lab's end does."""
        process = subprocess.Popen(
            [*self._enter(None), *argv],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=_ENVIRON,
        )  # fmt: skip
        self._spawned.append(process)
        return process

    def systemctl(
        self, *words: str, check: bool = True, timeout_s: float = 90.0
    ) -> subprocess.CompletedProcess[str]:
        return self.run(["systemctl", *words], check=check, timeout_s=timeout_s)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as ``systemctl show`` gives them."""
        output = self.systemctl("show", unit, "--property", ",".join(properties)).stdout
        return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)

    def journal(self, unit: str) -> list[Entry]:
        """All that the unit, and systemd about the unit, has said so far."""
        return parse_entries(self.run(["journalctl", "--all", "--output=json", "--unit", unit]).stdout)

    @contextlib.contextmanager
    def following(self) -> Iterator[Journal]:
        """The journal as it grows."""
        argv = ["journalctl", "--follow", "--lines=all", "--all", "--output=json"]
        with Journal(self.spawn(argv)) as journal:
            yield journal

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Put the calling thread, and all threads and processes that it starts, into the lab's network."""
        with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{self.pid}/ns/net") as theirs:
            enter_network(theirs.fileno())
            try:
                yield
            finally:
                enter_network(ours.fileno())

    def _boot_command(self) -> list[str]:
        binds = [word for source, target in self._binds.items() for word in (str(source), target)]
        boot = str(Path(__file__).with_name("boot.sh"))
        keep = [boot, "keep", str(self.cgroup), str(self.room), f"{self._life_s:g}", *binds]
        return ["setpriv", "--pdeathsig", "TERM", *keep]

    def _enter(self, user: str | None) -> list[str]:
        """``nsenter`` stays outside as the parent of the command, which dies with it."""
        namespaces = ["-m", "-p", "-u", "-i", "-n", "-C", "-r", "-w"]
        switch = [] if user is None else ["--reuid", user, "--regid", user, "--init-groups"]
        return ["nsenter", "-t", str(self.pid), *namespaces, "--", "setpriv", "--pdeathsig", "KILL", *switch]


def _until_ready(ready: socket.socket, keeper_pid: int, log: TextIO) -> int:
    """Wait for READY=1 from PID 1 of the lab; its pid as we see it, which the kernel vouches for."""
    deadline_s = time.monotonic() + _BOOT_S
    keeper_fd = os.pidfd_open(keeper_pid)
    try:
        while (left_s := deadline_s - time.monotonic()) > 0:
            readable, _, _ = select.select([ready, keeper_fd], [], [], left_s)
            if ready in readable:
                message, ancillary, _, _ = ready.recvmsg(4096, socket.CMSG_SPACE(struct.calcsize("3i")))
                pid, _, _ = struct.unpack("3i", ancillary[0][2])
                if "READY=1" in message.decode().splitlines():
                    return int(pid)
            elif keeper_fd in readable:
                break
    finally:
        os.close(keeper_fd)
    log.seek(0)
    raise AssertionError(f"systemd did not come up within {_BOOT_S:g} s:\n{log.read()}")


def own_cgroup() -> Path | None:
    """Our directory in the unified hierarchy; None when that is not mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            mount = fields.split(" ")[4]
            path = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
            return Path(mount + path[1]) if path else None
    return None


def _effective_capabilities() -> int:
    match = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1], 16) if match else 0


def _systemd_version() -> int:
    output = subprocess.run([_SYSTEMD, "--version"], capture_output=True, text=True, timeout=10).stdout
    match = re.match(r"systemd (\d+)", output)
    return int(match[1]) if match else 0
