"""The key file that makes a node's PeerID: created once, readable by its owner only, used by one process."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey

from petalsd.errors import ConfigError, SwarmError
from petalsd.file_locks import lock_within, try_lock

_UNNAMED_PREFIX = ".petalsd-key-"
_LOCK_S = 10.0  # to make a key takes a second
_CANNOT_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # FAT, some file systems over the network


def ensure_identity(path: Path) -> str:
    """Create the key if the file is missing; the base58 PeerID it stands for."""
    _remove_strays(path.parent)
    try:
        _create(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise SwarmError(
            f"identity file {path} cannot be written: {error.strerror}",
            hint="make room there, let this user write, or set swarm.identity_path",
        ) from error
    return read_peer_id(path)


def read_peer_id(path: Path) -> str:
    """The base58 PeerID of an existing key file."""
    try:
        return str(PeerID.from_identity(path.read_bytes()).to_base58())
    except OSError as error:
        raise SwarmError(
            f"identity file {path} cannot be read: {error.strerror}",
            hint="it must belong to the user that runs petalsd; for a service, after a copy: chown petalsd: FILE",
        ) from error
    except Exception as error:  # protobuf and key parsers raise many kinds
        raise ConfigError(  # trying again does not help
            f"identity file {path} holds no usable key", hint="delete it to get a new identity"
        ) from error


class IdentityLock:
    """Two processes with one identity would tear each other's connections; the second is refused."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """SwarmError where another process has it, or where nobody can be told whether one has."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_ours = try_lock(fd)
        except OSError as error:
            os.close(fd)
            raise SwarmError(
                f"identity file {self._path} cannot be locked: {error.strerror}",
                hint="set swarm.identity_path to a file on a local file system",
            ) from error
        if not is_ours:
            os.close(fd)
            raise SwarmError(
                f"identity file {self._path} is in use by another process",
                hint="stop that process or give this one its own identity_path",
            )
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _create(path: Path) -> None:
    """Under its name the key is whole and on the disk, whenever the power goes: the beginning of one would be
    refused at every later start. FileExistsError where there is one; it stays. OSError, also when another process
    holds the directory for too long.
    """
    if os.path.lexists(path):
        raise FileExistsError
    key = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=RSAPrivateKey().to_bytes())
    with _opened(path.parent) as directory:
        if not _lock_if_possible(directory):
            raise TimeoutError(errno.ETIMEDOUT, f"another process has held its directory for {_LOCK_S:.0f} s")
        _write(key.SerializeToString(), path)
        with contextlib.suppress(OSError):
            os.fsync(directory)


def _lock_if_possible(directory: int) -> bool:
    """Not all file systems can; nobody removes strays there either."""
    try:
        return lock_within(directory, _LOCK_S)
    except OSError:
        return True


def _write(content: bytes, path: Path) -> None:
    fd, name = tempfile.mkstemp(prefix=_UNNAMED_PREFIX, dir=path.parent)  # with mode 0600
    unnamed = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o400)
            os.fsync(file.fileno())
        _name(unnamed, path)
    finally:
        unnamed.unlink(missing_ok=True)


def _remove_strays(directory: Path) -> None:
    """Keys without a name, which a crash left behind: none that another process is making now, with its lock."""
    with contextlib.suppress(OSError), _opened(directory) as fd:
        strays = directory.glob(f"{_UNNAMED_PREFIX}*") if try_lock(fd) else ()
        for stray in strays:
            stray.unlink(missing_ok=True)


def _name(file: Path, path: Path) -> None:
    """Never in the place of another: of two daemons that start at once, the second takes the first one's key.

    Where files cannot have two names the lock on the directory sees to that.
    """
    try:
        os.link(file, path)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        if os.path.lexists(path):
            raise FileExistsError from None
        file.rename(path)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
