"""Where an instance keeps its files: systemd's directory variables, else the XDG directories."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from petalsd.errors import ConfigError

SYSTEM_RUN_DIR = Path("/run/petalsd")
CONTROL_SOCKET_NAME = "control.sock"
_MAX_SOCKET_ADDRESS_BYTES = 107  # sun_path of sockaddr_un, less the final zero
# Of a socket whose path is longer: its directory goes by a descriptor, of which Linux counts 2**20 at most.
_MAX_SOCKET_NAME_BYTES = _MAX_SOCKET_ADDRESS_BYTES - len("/proc/self/fd/1048575/")
_INSTANCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class InstancePaths:
    """Directories of one instance; none of them need exist yet.

    state_dir    identity key, measurements: this instance's own, kept
    cache_dir    weights, references: shared by all instances, can be deleted
    runtime_dir  control socket: gone after a restart of the machine; None where there is no such place
    credentials_dir  secrets that the service manager passes (LoadCredential=); None where it passes none
    """

    instance: str
    state_dir: Path
    cache_dir: Path
    runtime_dir: Path | None = None
    credentials_dir: Path | None = None

    @property
    def control_socket(self) -> Path:
        return (self.runtime_dir or self.state_dir) / CONTROL_SOCKET_NAME

    @property
    def identity_file(self) -> Path:
        return self.state_dir / "identity.key"

    @property
    def throughput_file(self) -> Path:
        return self.state_dir / "throughput.json"

    @property
    def weights_dir(self) -> Path:
        return self.cache_dir / "weights"

    @property
    def references_dir(self) -> Path:
        return self.cache_dir / "references"


def instance_paths(instance: str, environ: Mapping[str, str]) -> InstancePaths:
    """Directories of ``instance``. Under systemd the unit already made them its own (StateDirectory=)."""
    check_instance_name(instance)
    state = _systemd_dir(environ, "STATE_DIRECTORY")
    cache = _systemd_dir(environ, "CACHE_DIRECTORY")
    return InstancePaths(
        instance,
        state_dir=state or _xdg(environ, "XDG_STATE_HOME", ".local/state") / instance,
        cache_dir=cache or _xdg(environ, "XDG_CACHE_HOME", ".cache"),
        runtime_dir=_systemd_dir(environ, "RUNTIME_DIRECTORY") or _own_runtime_dir(instance, environ),
        credentials_dir=_systemd_dir(environ, "CREDENTIALS_DIRECTORY"),
    )


def control_socket_of(instance: str, environ: Mapping[str, str], system_dir: Path = SYSTEM_RUN_DIR) -> Path:
    """Where to find the daemon ``instance``: the service's socket if there is one, else the user's own.

    Looks for the service's directory: what is in there may be hidden from this user.
    """
    check_instance_name(instance)
    service = system_dir / instance
    return (
        service / CONTROL_SOCKET_NAME
        if service.is_dir()
        else instance_paths(instance, environ).control_socket
    )


def config_file_of(instance: str, environ: Mapping[str, str]) -> Path:
    """/etc/petalsd/NAME.toml; a user's own instance lives in the XDG configuration directory."""
    check_instance_name(instance)
    system = (_systemd_dir(environ, "CONFIGURATION_DIRECTORY") or Path("/etc/petalsd")) / f"{instance}.toml"
    own = own_config_dir(environ) / f"{instance}.toml"
    return own if is_there(own) and not is_there(system) else system


def own_config_dir(environ: Mapping[str, str]) -> Path:
    """Where a user keeps instances that are no services."""
    return _xdg(environ, "XDG_CONFIG_HOME", ".config")


def check_socket_path(path: Path) -> None:
    """ConfigError when ``unix_address`` could not give an address of that length."""
    name_bytes = len(os.fsencode(path.name))
    if len(os.fsencode(path)) > _MAX_SOCKET_ADDRESS_BYTES and name_bytes > _MAX_SOCKET_NAME_BYTES:
        raise ConfigError(
            f"control.socket = {path}: the file name has {name_bytes} bytes",
            hint=f"give it one of {_MAX_SOCKET_NAME_BYTES} at most, "
            f"or a path of {_MAX_SOCKET_ADDRESS_BYTES} at most in all",
        )


@contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """What to bind or connect to for the socket ``path``, which may be longer than such an address can be."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_ADDRESS_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def is_there(path: Path) -> bool:
    """Also True where we may not look: whoever opens it says why it cannot be."""
    try:
        return path.exists()
    except OSError:
        return True


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def is_instance_name(name: str) -> bool:
    return _INSTANCE_NAME.fullmatch(name) is not None


def check_instance_name(instance: str) -> None:
    if not is_instance_name(instance):
        raise ConfigError(f"instance = {instance!r}: use letters, digits, '_', '-' and '.'")


def _systemd_dir(environ: Mapping[str, str], name: str) -> Path | None:
    """The first of the colon-separated directories, as the unit lists them."""
    first = environ.get(name, "").partition(":")[0]
    return Path(first) if first else None


def _own_runtime_dir(instance: str, environ: Mapping[str, str]) -> Path | None:
    """XDG gives this directory to users who are logged in, and no default for it."""
    given = Path(environ.get("XDG_RUNTIME_DIR", ""))
    return given / "petalsd" / instance if given.is_absolute() else None


def _xdg(environ: Mapping[str, str], name: str, below_home: str) -> Path:
    """XDG says that relative values are to be ignored."""
    given = Path(environ.get(name, ""))
    return (given if given.is_absolute() else _home(environ) / below_home) / "petalsd"


def _home(environ: Mapping[str, str]) -> Path:
    """The root, as in containers, for a user whom the machine does not know."""
    try:
        return Path(environ.get("HOME") or Path.home())
    except RuntimeError:
        return Path("/")
