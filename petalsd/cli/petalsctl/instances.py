"""Which daemon is meant, where its socket is, and what to type when it does not answer."""

from __future__ import annotations

import getpass
import grp
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from petalsd.cli.petalsctl.connection import is_listening
from petalsd.cli.petalsctl.problems import BadUsage, NoAnswer
from petalsd.errors import ConfigError
from petalsd.paths import (
    CONTROL_SOCKET_NAME,
    SYSTEM_RUN_DIR,
    check_instance_name,
    config_file_of,
    control_socket_of,
    is_instance_name,
    is_there,
    own_config_dir,
)

_GROUP = "petalsd"


@dataclass(frozen=True, slots=True)
class System:
    """Where services keep their files; tests have one of their own."""

    run_dir: Path = SYSTEM_RUN_DIR
    config_dir: Path = Path("/etc/petalsd")


@dataclass(frozen=True, slots=True)
class Instance:
    """``name`` is None when only the socket was given. ``is_service``: one of systemd's, not a user's own."""

    name: str | None
    socket: Path
    is_service: bool

    @property
    def title(self) -> str:
        if self.name is None:
            return f"the daemon at {self.socket}"
        return f"petalsd@{self.name}" if self.is_service else f"petalsd {self.name}"

    @property
    def start_command(self) -> str:
        if self.name is None:
            return "start it, or leave --socket out to find the one that runs"
        return (
            f"sudo systemctl start petalsd@{self.name}"
            if self.is_service
            else f"petalsd run --instance {self.name}"
        )

    @property
    def restart_command(self) -> str:
        is_unit = self.name is not None and self.is_service
        return f"sudo systemctl restart petalsd@{self.name}" if is_unit else "stop it and start it again"

    @property
    def log_command(self) -> str:
        return f"journalctl -u petalsd@{self.name}" if self.name and self.is_service else ""


def find_instance(
    name: str | None, socket: Path | None, environ: Mapping[str, str], system: System
) -> Instance:
    """The one that was named, or the only one there is. BadUsage when several are running, NoAnswer for none."""
    if socket is not None:
        return Instance(None, socket, is_service=socket.is_relative_to(system.run_dir))
    if name is not None:
        return named_instance(name, environ, system)
    found = running_instances(environ, system)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(instance.name) for instance in found)
        raise BadUsage(
            f"several instances are running: {names}",
            hint=f"name one: petalsctl -i {found[0].name} …",
        )
    raise _nobody_found(environ, system)


def named_instance(name: str, environ: Mapping[str, str], system: System) -> Instance:
    try:
        check_instance_name(name)
    except ConfigError as error:
        raise BadUsage(error.message) from error
    service = system.run_dir / name / CONTROL_SOCKET_NAME
    if _exists(service) or _exists(system.config_dir / f"{name}.toml"):
        socket = _configured_socket(system.config_dir / f"{name}.toml") or service
        return Instance(name, socket, is_service=True)
    file = config_file_of(name, environ)
    socket = _configured_socket(file) or control_socket_of(name, environ, system.run_dir)
    own = Instance(name, socket, is_service=False)
    if not _exists(own.socket) and not is_there(file):
        raise _unknown(name, environ, system)
    return own


def running_instances(environ: Mapping[str, str], system: System) -> list[Instance]:
    """Those with a socket; one that nobody listens on counts only where there is no better one."""
    found: dict[str, Instance] = {}
    for directory in (system.run_dir, *_own_directories(environ)):
        for path in _sockets_in(directory):
            name = path.parent.name
            found.setdefault(name, Instance(name, path, is_service=directory == system.run_dir))
    for instance in all_configured(environ, system):
        if _exists(instance.socket):
            found[str(instance.name)] = instance
    sockets = list(found.values())
    if len(sockets) < 2:
        return sockets
    return [instance for instance in sockets if is_listening(instance.socket)] or sockets


def all_configured(environ: Mapping[str, str], system: System) -> list[Instance]:
    """Services first, then this user's own, whether they run or not."""
    services = _names_in(system.config_dir)
    names = [*services, *(name for name in _names_in(own_config_dir(environ)) if name not in services)]
    return [named_instance(name, environ, system) for name in names]


def explain(instance: Instance, error: OSError, argv: Iterable[str]) -> NoAnswer:
    """Why nobody could be asked, and the command to type next."""
    title, log = instance.title, instance.log_command
    see = f"; {log} says why it ended" if log else ""
    if isinstance(error, FileNotFoundError):
        return NoAnswer(f"{title} is not running", hint=instance.start_command + see, is_absent=True)
    if isinstance(error, ConnectionRefusedError):
        return NoAnswer(
            f"{title} is not running: nobody listens on the {instance.socket} that it left",
            hint=instance.start_command + see,
            is_absent=True,
        )
    if isinstance(error, PermissionError):
        group = _group_of(instance.socket) if instance.is_service else None
        ways = ways_to_permission(group, argv)
        return NoAnswer(f"this user may not talk to {title}", hint=ways, is_forbidden=True)
    look = log or "look at its log"
    if isinstance(error, TimeoutError | BlockingIOError):  # the latter where too many wait for it already
        return NoAnswer(f"{title} does not answer in time", hint=look)
    if isinstance(error, ConnectionError):
        return NoAnswer(f"{title} closed the connection: it may be stopping", hint=look)
    return NoAnswer(f"{title} cannot be asked: {error.strerror or error}", hint=look)


def ways_to_permission(group: str | None, argv: Iterable[str]) -> str:
    """The same command as root, or this user in the group that may, if there is one."""
    command = shlex.join(["sudo", "petalsctl", *argv])
    if group is None:
        return command
    join = shlex.join(["sudo", "usermod", "-aG", group, _user()])
    return f"{command}; or join its group: {join}, then log in again"


def _nobody_found(environ: Mapping[str, str], system: System) -> NoAnswer:
    if not os.access(system.run_dir, os.R_OK | os.X_OK) and system.run_dir.exists():
        return NoAnswer(
            f"this user may not look into {system.run_dir}", hint="sudo petalsctl …", is_forbidden=True
        )
    configured = all_configured(environ, system)
    if not configured:
        return NoAnswer(
            f"no petalsd is running, and none is configured in {system.config_dir} or {own_config_dir(environ)}",
            hint=f"write {system.config_dir}/NAME.toml, then: sudo systemctl start petalsd@NAME",
            is_absent=True,
        )
    first = configured[0]
    if len(configured) == 1:
        see = f"; {first.log_command} says why it ended" if first.log_command else ""
        return NoAnswer(f"{first.title} is not running", hint=first.start_command + see, is_absent=True)
    return NoAnswer(
        f"no petalsd is running; configured are {', '.join(str(one.name) for one in configured)}",
        hint=first.start_command,
        is_absent=True,
    )


def _unknown(name: str, environ: Mapping[str, str], system: System) -> NoAnswer:
    running = [str(instance.name) for instance in running_instances(environ, system)]
    known = f"running: {', '.join(running)}" if running else "no other one is running"
    return NoAnswer(
        f"there is no instance {name}: neither a socket nor {name}.toml in {system.config_dir} or "
        f"{own_config_dir(environ)}",
        hint=known,
        is_absent=True,
    )


def _own_directories(environ: Mapping[str, str]) -> list[Path]:
    """Where daemons that were started by hand have theirs: the parents of what ``control_socket_of`` says."""
    in_runtime = control_socket_of("x", environ).parent.parent
    in_state = control_socket_of("x", {**environ, "XDG_RUNTIME_DIR": ""}).parent.parent
    return list(dict.fromkeys([in_runtime, in_state]))


def _names_in(directory: Path) -> list[str]:
    """Of the configuration files there that can be instances."""
    try:
        names = sorted(path.stem for path in directory.glob("*.toml"))
    except OSError:
        return []
    return [name for name in names if is_instance_name(name)]


def _sockets_in(directory: Path) -> list[Path]:
    try:
        return sorted(directory.glob(f"*/{CONTROL_SOCKET_NAME}"))
    except OSError:
        return []


def _configured_socket(file: Path) -> Path | None:
    """control.socket of an instance's file, where it sets one and we may read it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return None
    if "socket" not in text:
        return None
    import tomllib  # late: hardly any file sets this key

    try:
        control = tomllib.loads(text).get("control", {})
        return Path(control["socket"]).expanduser() if control.get("socket") else None
    except (ValueError, AttributeError, TypeError, RuntimeError):  # of which nesting is one
        return None


def _exists(path: Path) -> bool:
    """Also True where we may not look."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _group_of(path: Path) -> str:
    try:
        return grp.getgrgid(path.lstat().st_gid).gr_name
    except (OSError, KeyError):
        return _GROUP


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "USER"
