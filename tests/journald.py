"""The journal's end of its native protocol: a real datagram socket, and messages taken apart as journald does."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from pathlib import Path

ALL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_MAX_DATAGRAM_BYTES = 1 << 20


class Receiver:
    """Listens at ``path``. ``num_files`` counts the messages that came as files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.num_files = 0

    def start(self) -> None:
        self._socket.bind(str(self._path))
        self._socket.settimeout(5)

    def stop(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def receive(self) -> dict[str, str]:
        """The fields of the next message; TimeoutError when none comes."""
        data, ancillary, _, _ = self._socket.recvmsg(_MAX_DATAGRAM_BYTES, socket.CMSG_SPACE(4))
        for _, kind, rights in ancillary:
            assert kind == socket.SCM_RIGHTS
            assert data == b""
            self.num_files += 1
            data = _read_sealed(array.array("i", rights)[0])
        return parse(data)

    def drain(self) -> list[dict[str, str]]:
        """All that has come."""
        messages = []
        self._socket.setblocking(False)
        try:
            while True:
                messages.append(self.receive())
        except BlockingIOError:
            self._socket.settimeout(5)
            return messages


def parse(data: bytes) -> dict[str, str]:
    """Fields of one message; AssertionError where journald would ignore a part."""
    fields: dict[str, str] = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", data)
            value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
            assert end == b"\n"
        key = name.decode()
        assert key.isascii() and key.replace("_", "A").isalnum() and key.isupper() and len(key) <= 64, key
        assert not key.startswith("_") and not key[0].isdigit(), key
        assert key not in fields, f"{key} twice"
        fields[key] = value.decode()
    return fields


def _read_sealed(fd: int) -> bytes:
    """As journald, which takes only files that nobody can change any more."""
    with os.fdopen(fd, "rb") as file:
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == ALL_SEALS
        file.seek(0)
        return file.read()
