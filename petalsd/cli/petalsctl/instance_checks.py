"""What one instance needs: a right configuration, room for its blocks, a free port, peers that can be reached."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petalsd.cli.petalsctl.findings import Check, Finding, Level
from petalsd.cli.petalsctl.instances import Instance, System
from petalsd.cli.petalsctl.units import duration, size
from petalsd.config import Config
from petalsd.config_loading import load_config
from petalsd.errors import ConfigError, PetalsdError
from petalsd.imports import heavy_imports
from petalsd.paths import InstancePaths, config_file_of, instance_paths, is_there

_DIAL_TIMEOUT_S = 3.0
_FORWARD = "forward the p2p port to this machine, and set swarm.host_maddrs and announce_maddrs"
_MAX_DIALLED = 8
_LOW_DISK_BYTES = 2 << 30
_STREAM_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)")
_SEVERITY_LEVELS: Mapping[str, Level] = {"critical": "fail", "warning": "warn", "info": "ok"}
# What preflight finds about files that only the service's own user may touch: whoever looks is another one.
_OWNED_BY_SERVICE = frozenset({"identity", "state directory", "weights cache", "control socket"})


@dataclass(frozen=True, slots=True)
class Patient:
    """``status`` is the running daemon's, None when it does not answer."""

    instance: Instance
    system: System
    environ: Mapping[str, str]
    status: Mapping[str, Any] | None

    @property
    def config_file(self) -> Path:
        assert self.instance.name is not None
        if self.instance.is_service:
            return self.system.config_dir / f"{self.instance.name}.toml"
        return config_file_of(self.instance.name, self.environ)

    @property
    def paths(self) -> InstancePaths:
        """A service's directories are systemd's, whoever looks."""
        assert self.instance.name is not None
        name = self.instance.name
        if not self.instance.is_service:
            return instance_paths(name, self.environ)
        return instance_paths(
            name, {"STATE_DIRECTORY": f"/var/lib/petalsd/{name}", "CACHE_DIRECTORY": "/var/cache/petalsd"}
        )

    @property
    def is_closed(self) -> bool:
        """A service's directories are closed to all but its own user and root."""
        return self.instance.is_service and os.geteuid() != 0

    @property
    def is_serving(self) -> bool:
        return self.status is not None and self.status.get("span") is not None


def instance_checks(patient: Patient) -> Iterator[tuple[str, Check]]:
    """The checks that are possible; those that need the configuration only when there is a valid one."""
    yield "daemon", lambda: check_daemon(patient)
    try:
        config = _load(patient)
    except (PetalsdError, OSError) as error:
        finding = _bad_config(patient, error)
        yield "configuration", lambda: finding
        return
    yield "configuration", lambda: Finding("configuration", "ok", f"{patient.config_file} is valid")
    yield "model", lambda: check_model(patient, config)
    yield "disk", lambda: check_disk(patient, config)
    yield "p2p port", lambda: check_ports(patient, config)
    yield "reachability", lambda: check_reachability(patient, config)
    yield "initial peers", lambda: check_peers(config)


def check_daemon(patient: Patient) -> Iterator[Finding]:
    """The daemon's own word, and its warnings."""
    status = patient.status
    if status is None:
        text = f"{patient.instance.title} does not answer"
        fix = patient.instance.start_command
        yield Finding(
            "daemon", "warn", text, f"{fix}; {log}" if (log := patient.instance.log_command) else fix
        )
        return
    state, since = status["state"], duration(status["since_s"])
    level: Level = "ok" if state == "online" else "fail" if state == "failed" else "warn"
    reason = f": {status['reason']}" if status["reason"] and level != "ok" else ""
    yield Finding("daemon", level, f"{patient.instance.title} is {state} for {since}{reason}")
    for warning in status["warnings"]:
        yield Finding(
            warning["code"],
            _SEVERITY_LEVELS.get(warning["severity"], "warn"),
            warning["title"],
            warning["hint"],
        )


def check_model(patient: Patient, config: Config) -> Iterator[Finding]:
    """What ``petalsd check`` finds. A daemon that serves has taken its memory already."""
    try:
        yield from _preflight(patient, config)
    except PermissionError as error:
        if not patient.is_closed:
            raise
        fix = f"sudo petalsctl -i {patient.instance.name} doctor"
        yield Finding("model", "warn", f"this user may not look at {error.filename}", fix)


def _preflight(patient: Patient, config: Config) -> Iterator[Finding]:
    with heavy_imports():
        from petalsd.daemon.preflight import inspect

    for found in inspect(config, patient.paths):
        if found.name == "swarm" or (found.name in _OWNED_BY_SERVICE and patient.instance.is_service):
            continue
        if found.name == "spill file" and patient.is_closed:
            continue
        if found.name == "blocks" and patient.is_serving:
            assert patient.status is not None
            span = patient.status["span"]
            yield Finding("memory", "ok", f"blocks {span['start']}:{span['end']} are loaded")
            continue
        name = "memory" if found.name == "blocks" else found.name
        yield Finding(name, "ok" if found.is_ok else "fail", found.text)


def check_disk(patient: Patient, config: Config) -> Iterator[Finding]:
    """Where weights and state are kept."""
    directories = {
        "weights": config.model.cache_dir or patient.paths.weights_dir,
        "state": patient.paths.state_dir,
    }
    seen: set[int] = set()
    for directory in directories.values():
        existing = directory
        while not os.path.exists(existing):  # nor, for us, what we may not look at
            existing = existing.parent
        device = existing.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(existing).free
        text = f"{size(free)} free at {existing}"
        if free < _LOW_DISK_BYTES:
            fix = "make room, or set model.cache_dir to a larger disk"
            yield Finding("disk", "fail" if free < _LOW_DISK_BYTES // 16 else "warn", text, fix)
        else:
            yield Finding("disk", "ok", text)


def check_ports(patient: Patient, config: Config) -> Iterator[Finding]:
    """A port that is taken by the daemon itself is well.

    It tells its addresses as others dial them: with swarm.announce_maddrs, not those that it listens on.
    """
    status = patient.status or {"maddrs": (), "peer_id": None}
    own_ports = {port for _, _, port in _addresses(status["maddrs"])}
    is_hidden = bool(status["peer_id"] and config.swarm.announce_maddrs)
    for family, host, port in _addresses(config.swarm.host_maddrs):
        name = f"{_bracketed(host)}:{port}"
        if port == 0:
            yield Finding("p2p port", "ok", f"{_bracketed(host)}: any free one; a fixed one can be forwarded")
        elif port in own_ports:
            yield Finding("p2p port", "ok", f"{name} is the daemon's")
        else:
            yield _try_port(family, host, port, is_hidden)


def check_reachability(patient: Patient, config: Config) -> Finding:
    """Whether others can dial us. Only a running daemon has asked them."""
    swarm, status = config.swarm, patient.status
    if status is not None and status["peer_id"]:
        if config.daemon.role == "bootstrap":
            return _node_reachability(status["is_reachable"])
        if not status.get("is_relayed"):
            return Finding("reachability", "ok", "the daemon is dialled directly")
        return Finding("reachability", "warn", "reached through relays only: slow", _FORWARD)
    if not swarm.initial_peers:
        return Finding("reachability", "ok", "a private swarm of our own")
    return Finding("reachability", "ok", "is asked of other peers when the daemon starts")


def _node_reachability(is_reachable: bool | None) -> Finding:
    """Of a bootstrap node, which is of no use where it cannot be dialled."""
    if is_reachable is None:
        return Finding("reachability", "ok", "nobody could be asked yet")
    if is_reachable:
        return Finding("reachability", "ok", "others dial this node directly")
    return Finding("reachability", "fail", "other peers cannot dial this node", _FORWARD)


def check_peers(config: Config) -> Iterator[Finding]:
    """One of them is enough to join; only TCP addresses are tried."""
    from petalsd.swarm.protocol import PUBLIC_INITIAL_PEERS

    peers = config.swarm.initial_peers
    if not peers:
        return
    maddrs: Sequence[str] = PUBLIC_INITIAL_PEERS if peers == "public" else peers
    targets = list(_addresses(maddrs))[:_MAX_DIALLED]
    if not targets:
        yield Finding("initial peers", "ok", f"{len(maddrs)}, none with a TCP address to try")
        return
    with ThreadPoolExecutor(len(targets)) as pool:
        problems = list(pool.map(_dial, targets))
    reached = problems.count("")
    if reached == len(targets):
        yield Finding("initial peers", "ok", f"all {reached} answer")
        return
    first = next(problem for problem in problems if problem)
    is_alone = not reached and config.daemon.role == "server"  # a bootstrap node is there without others
    level: Level = "fail" if is_alone else "warn"
    fix = "check their addresses, this machine's network and its firewall"
    yield Finding("initial peers", level, f"{reached} of {len(targets)} answer; {first}", fix)


def _load(patient: Patient) -> Config:
    """A service takes nothing from our environment."""
    file, is_service = patient.config_file, patient.instance.is_service
    environ = {} if is_service else patient.environ
    return load_config(file if is_service or is_there(file) else None, environ, ()).config


def _bad_config(patient: Patient, error: PetalsdError | OSError) -> Finding:
    file = patient.config_file
    if isinstance(error, OSError) or (is_there(file) and not os.access(file, os.R_OK)):
        fix = f"sudo petalsctl -i {patient.instance.name} doctor"
        return Finding("configuration", "warn", f"this user may not read {file}", fix)
    if not os.path.exists(file):
        return Finding("configuration", "fail", f"there is no {file}", "see petalsd.toml(5) for an example")
    text = error.message + (f" ({error.hint})" if error.hint else "")
    return Finding(
        "configuration", "fail" if isinstance(error, ConfigError) else "warn", text, f"edit {file}"
    )


def _addresses(maddrs: Sequence[str]) -> Iterator[tuple[int, str, int]]:
    """(address family, host, port) of those that speak TCP."""
    for maddr in maddrs:
        if found := _STREAM_ADDRESS.match(maddr):
            family = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}.get(found[1], socket.AF_UNSPEC)
            yield family, found[2], int(found[3])


def _try_port(family: int, host: str, port: int, is_hidden: bool) -> Finding:
    """``is_hidden``: the daemon listens, it is not known where."""
    name = f"{_bracketed(host)}:{port}"
    with socket.socket(family or socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and is_hidden:
                return Finding("p2p port", "ok", f"{name} is taken: by the daemon, which announces others")
            return _port_problem(error, port, name)
    return Finding("p2p port", "ok", f"{name} is free")


def _port_problem(error: OSError, port: int, name: str) -> Finding:
    if error.errno == errno.EADDRINUSE:
        fix = f"sudo ss -ltnp 'sport = :{port}' shows by whom; or change swarm.host_maddrs"
        return Finding("p2p port", "fail", f"{name} is taken", fix)
    if error.errno == errno.EACCES:
        return Finding("p2p port", "fail", f"{name} needs root", "use a port above 1023 in swarm.host_maddrs")
    if error.errno == errno.EADDRNOTAVAIL:
        fix = "swarm.host_maddrs names addresses of this machine; use 0.0.0.0 for all of them"
        return Finding("p2p port", "fail", f"{name} is no address of this machine", fix)
    return Finding("p2p port", "warn", f"{name} cannot be tried: {error.strerror}")


def _dial(target: tuple[int, str, int]) -> str:
    """Empty when somebody accepted, else what went wrong."""
    _, host, port = target
    try:
        socket.create_connection((host, port), _DIAL_TIMEOUT_S).close()
    except OSError as error:
        return f"{_bracketed(host)}:{port}: {error.strerror or 'no answer in time'}"
    return ""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
