"""The socket's file: live ones are left alone, stale ones replaced, our own removed."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest

from petalsd.control.access import Access
from petalsd.control.socket_file import SocketFile
from petalsd.errors import ConfigError, Conflict
from petalsd.paths import unix_address

ACCESS = Access(os.geteuid(), None, None)


def test_everybody_may_connect(tmp_path: Path) -> None:
    """Also where the umask of the service says otherwise: who may act is decided by who it is."""
    path = tmp_path / "run" / "control.sock"
    before = os.umask(0o077)
    try:
        listener = SocketFile(path, ACCESS).open()
    finally:
        os.umask(before)
    with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700  # made here: outside systemd, for this user


def test_a_close_removes_only_our_own_file(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    file = SocketFile(path, ACCESS)
    with file.open():
        path.unlink()
        path.write_text("somebody else's")
    file.close()
    assert path.read_text() == "somebody else's"


def test_a_socket_that_lives_is_not_taken_over(tmp_path: Path) -> None:
    """The command that shows whose it is reaches it, whatever that one's instance is called."""
    path = tmp_path / "a socket"
    file = SocketFile(path, ACCESS)
    with file.open():
        with pytest.raises(Conflict, match="another daemon listens on") as taken:
            SocketFile(path, ACCESS).open()
        assert taken.value.hint.startswith(f"petalsctl --socket '{path}' status shows it")
        assert path.is_socket()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_nor_is_one_without_a_lock(tmp_path: Path) -> None:
    """Somebody has deleted the lock file, or never knew of it."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(Conflict, match="another daemon listens on"):
            SocketFile(path, ACCESS).open()
    assert path.is_socket()


def test_a_daemon_that_is_just_starting_holds_the_place(tmp_path: Path) -> None:
    """It has the lock and no socket yet."""
    path = tmp_path / "control.sock"
    with (tmp_path / "control.sock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Conflict):
            SocketFile(path, ACCESS).open()
    with SocketFile(path, ACCESS).open():
        assert path.is_socket()


def test_a_stale_one_is_replaced(tmp_path: Path) -> None:
    """A daemon that was killed leaves its file, and nobody behind it."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    old = path.stat().st_ino
    with SocketFile(path, ACCESS).open(), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert path.is_socket()
    assert old  # the inode may be used again: that it answers is what counts


def test_something_else_in_its_place_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("a letter")
    with pytest.raises(ConfigError, match=r"control.socket = .*: there is something else than a socket"):
        SocketFile(path, ACCESS).open()
    assert path.read_text() == "a letter"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "control.sock"
    with pytest.raises(ConfigError, match=rf"control.socket = {path}: "):
        SocketFile(path, ACCESS).open()


def test_a_path_longer_than_an_address(tmp_path: Path) -> None:
    """Socket addresses end at 107 bytes; directories of instances need not."""
    path = tmp_path / ("d" * 100) / ("e" * 100) / "control.sock"
    client = socket.socket(socket.AF_UNIX)
    with SocketFile(path, ACCESS).open(), client, unix_address(path) as address:
        assert len(address) < 107
        client.connect(address)


def test_a_name_that_no_address_holds(tmp_path: Path) -> None:
    """Behind the directory's descriptor 85 bytes have room, whatever its number; nothing is made for more."""
    directory = tmp_path / ("d" * 100)
    SocketFile(directory / "sub" / ("ü" * 42), ACCESS).open().close()
    path = directory / ("ü" * 43)
    with pytest.raises(ConfigError, match=r"control\.socket = .*ü: the file name has 86 bytes"):
        SocketFile(path, ACCESS).open()
    assert os.listdir(directory) == ["sub"]
