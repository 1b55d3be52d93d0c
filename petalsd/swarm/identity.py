"""The key file that makes a node's PeerID: created once, readable by its owner only, used by one process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey

from petalsd.errors import ConfigError, SwarmError


def ensure_identity(path: Path) -> str:
    """Create the key if the file is missing; the base58 PeerID it stands for."""
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
        raise SwarmError(f"identity file {path} cannot be read: {error.strerror}") from error
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
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise SwarmError(
                f"identity file {self._path} is in use by another process",
                hint="stop that process or give this one its own identity_path",
            ) from None
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _create(path: Path) -> None:
    """An error leaves nothing behind: the beginning of a key would be refused at every later start."""
    key = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=RSAPrivateKey().to_bytes())
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(key.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
