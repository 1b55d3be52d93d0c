"""The key file: made once, private, used by one process."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from petalsd.errors import ConfigError, SwarmError
from petalsd.swarm import identity
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


def test_a_key_that_cannot_be_read_says_whose_it_must_be(tmp_path: Path) -> None:
    """As after a copy by root to another machine; it is tried again, for somebody may mend it meanwhile."""
    path = tmp_path / "identity.key"
    path.mkdir()
    with pytest.raises(SwarmError, match=r"identity\.key cannot be read: .*chown petalsd:"):
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


def test_no_moment_leaves_a_part_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may go at any moment: the name leads to a key that is whole, and on the disk, or to nothing.

    Nobody else can read it meanwhile.
    """
    path = tmp_path / "identity.key"
    synced: list[tuple[bool, bool]] = []  # of a directory; whether the key had its name by then
    fsync = os.fsync

    def watch(fd: int) -> None:
        mode = os.fstat(fd).st_mode
        synced.append((stat.S_ISDIR(mode), path.exists()))
        assert stat.S_ISDIR(mode) or mode & 0o077 == 0
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    ensure_identity(path)
    assert synced == [(False, False), (True, True)]
    assert os.listdir(tmp_path) == ["identity.key"]


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "no links"])
def test_who_comes_second_takes_the_key_of_the_first(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that start at once one is late by the moment in which the other names its key: both have one PeerID.

    Also where files cannot have a second name (FAT).
    """
    path, other = tmp_path / "identity.key", tmp_path / "other.key"
    theirs = ensure_identity(other)
    if not has_links:
        monkeypatch.setattr(os, "link", _no_links)
    fsync = os.fsync

    def be_late(fd: int) -> None:
        fsync(fd)
        if not path.exists():
            other.rename(path)

    with monkeypatch.context() as race:
        race.setattr(os, "fsync", be_late)
        assert ensure_identity(path) == theirs
    assert os.listdir(tmp_path) == ["identity.key"]


def test_a_file_system_without_links_holds_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT, and some that come over the network."""
    monkeypatch.setattr(os, "link", _no_links)
    path = tmp_path / "identity.key"
    assert ensure_identity(path) == read_peer_id(path) == ensure_identity(path)
    assert os.listdir(tmp_path) == ["identity.key"]


@pytest.mark.parametrize("has_key", [True, False], ids=["with a key", "without one"])
def test_what_a_crash_left_goes_at_the_next_start(has_key: bool, tmp_path: Path) -> None:
    """Whether it was before or after the key had its name; what another process is making stays."""
    path, stray = tmp_path / "identity.key", tmp_path / ".petalsd-key-abc"
    if has_key:
        ensure_identity(path)
        os.link(path, stray)
    stray.touch()
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    if has_key:
        ensure_identity(path)
        assert stray.exists()
    os.close(directory)
    assert ensure_identity(path) == read_peer_id(path)
    assert os.listdir(tmp_path) == ["identity.key"]


def _no_links(source: object, target: object, **options: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """Where the key cannot be written, the error says so."""
    with pytest.raises(SwarmError, match="cannot be written"):
        ensure_identity(tmp_path / "nowhere" / "identity.key")


def test_a_directory_that_another_process_holds_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for ever: what holds it may hang."""
    monkeypatch.setattr(identity, "_LOCK_S", 0.0)
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    with pytest.raises(SwarmError, match="another process has held its directory"):
        ensure_identity(tmp_path / "identity.key")
    os.close(directory)
    ensure_identity(tmp_path / "identity.key")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key can be made there; that nobody else uses it cannot be known."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "identity.key"
    assert ensure_identity(path) == read_peer_id(path)
    with pytest.raises(SwarmError, match="cannot be locked: No locks available"):
        IdentityLock(path).acquire()


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
