"""The key file: made once, private, used by one process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from petalsd.errors import ConfigError, SwarmError
from petalsd.swarm.identity import IdentityLock, ensure_identity, read_peer_id


def test_a_missing_key_is_created_for_its_owner_only(tmp_path: Path) -> None:
    """The file has mode 0400 and stands for the same PeerID ever after."""
    path = tmp_path / "identity.key"
    peer = ensure_identity(path)
    assert path.stat().st_mode & 0o777 == 0o400
    assert peer.startswith("Qm") and ensure_identity(path) == read_peer_id(path) == peer


def test_a_damaged_key_is_named(tmp_path: Path) -> None:
    """The error names the file and says what to do; nobody tries again, which would not help."""
    path = tmp_path / "identity.key"
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"identity\.key holds no usable key .*delete it"):
        ensure_identity(path)


def test_a_key_that_did_not_fit_the_disk_is_made_at_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No beginning of one stays, which would be refused for ever, also with room on the disk."""

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "identity.key"
    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "fsync", fail)
        with pytest.raises(SwarmError, match=r"identity\.key cannot be written: No space left"):
            ensure_identity(path)
    assert os.listdir(tmp_path) == []
    assert ensure_identity(path) == read_peer_id(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """Where the key cannot be written, the error says so."""
    with pytest.raises(SwarmError, match="cannot be written"):
        ensure_identity(tmp_path / "nowhere" / "identity.key")


def test_a_second_user_of_a_key_is_refused(tmp_path: Path) -> None:
    """While one holds the key no other does; afterwards it is free."""
    path = tmp_path / "identity.key"
    ensure_identity(path)
    first, second = IdentityLock(path), IdentityLock(path)
    first.acquire()
    with pytest.raises(SwarmError, match="in use by another process"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
