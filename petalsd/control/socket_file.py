"""The file of the control socket: taken over from a daemon that died, never from one that lives."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import stat
from pathlib import Path

import structlog

from petalsd.control.access import Access
from petalsd.errors import ConfigError, Conflict
from petalsd.file_locks import try_lock
from petalsd.paths import check_socket_path, unix_address

log = structlog.get_logger(__name__)

_MODE = 0o666  # who may do what is decided by who it is, not by the file
_BACKLOG = 64
_DIAL_TIMEOUT_S = 2.0


class SocketFile:
    """``open`` listens, ``close`` removes the file if it is still ours."""

    def __init__(self, path: Path, access: Access) -> None:
        self.path = path
        self._access = access
        self._lock: int | None = None
        self._inode: int | None = None

    def open(self) -> socket.socket:
        """A listening socket. Conflict when another daemon listens there, ConfigError when it cannot be made."""
        check_socket_path(self.path)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take_lock()
            self._clear_the_way()
            return self._listen()
        except OSError as error:
            self.close()
            raise ConfigError(
                f"control.socket = {self.path}: {error.strerror or error}",
                hint="set control.socket to a path in a directory that this user can write",
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent; the file of somebody who took our place stays."""
        inode, self._inode = self._inode, None
        with contextlib.suppress(OSError):
            if inode is not None and self.path.lstat().st_ino == inode:
                self.path.unlink()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def _take_lock(self) -> None:
        """Two daemons that start at once must not both find the place empty. Ends with the process."""
        lock_path = self.path.with_name(self.path.name + ".lock")
        self._lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not try_lock(self._lock):
            raise _taken(self.path)

    def _clear_the_way(self) -> None:
        """Remove what a daemon that died has left; dial first, for a lock file can be deleted by hand."""
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ConfigError(
                f"control.socket = {self.path}: there is something else than a socket",
                hint="move it away, or set control.socket to another path",
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, unix_address(self.path) as address:
            probe.settimeout(_DIAL_TIMEOUT_S)
            try:
                probe.connect(address)
            except (ConnectionRefusedError, FileNotFoundError):
                log.info("stale_socket_removed", path=str(self.path))
                self.path.unlink(missing_ok=True)
                return
            except OSError as error:
                log.debug("socket_not_dialled", error=str(error))
        raise _taken(self.path)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with unix_address(self.path) as address:
                listener.bind(address)
            self._inode = self.path.lstat().st_ino
            os.chmod(self.path, _MODE)
            if self._access.gid is not None:
                # Only for people who look at the file: it tells them which group to join.
                with contextlib.suppress(PermissionError):
                    os.chown(self.path, -1, self._access.gid)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener


def _taken(path: Path) -> Conflict:
    return Conflict(
        f"another daemon listens on {path}",
        hint=f"petalsctl --socket {shlex.quote(str(path))} status shows it; "
        "give this one an instance name or a control.socket of its own",
    )
