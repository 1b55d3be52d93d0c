"""systemd's journal, spoken natively: one datagram of fields per event, so that `journalctl` can select by field.

The protocol is short (systemd.io/JOURNAL_NATIVE_PROTOCOL) and asks for a socket and a memfd, which the standard
library has. The libraries for it bind libsystemd and want its headers wherever petalsd is built.

Nothing here blocks or raises: what the journal does not take goes to standard error, and what that does not take
at once either is counted, and the count is told when somebody listens again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import select
import socket
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "petalsd"

# What an operator alerts on. The ids stay the same in every version, and nothing else has them.
MESSAGE_IDS = {
    "online": "ede236f872b74b67bf6567af0bdc9792",
    "stopped": "fe80d6bf03174cf3902f4d474b0402c2",
    "failed": "ebc1899e98aa46a297f87fbca93fc97c",
    "engine_stuck": "2b2f3b95948246fda7f081c945af651c",
    "device_lost": "3a8c421b49594d51b33990aae1665fee",
    "engine_failed": "3b6db5ff456c4748a727c33046a96667",
    "loop_stuck": "56ddaf4d56604139b7a7e0015e694639",
    "swarm_lost": "4642d56808e341578973ae07e97a397c",
    "drain_abandoned": "578b5badc37541ca99786428e5e9e180",
    "reload_refused": "6fcd6064e8a64a6780e80d42f14d6692",
    "warning_raised": "f923dc27966a4c839ec8e9b85efdaa45",
}

_STDERR_FD = 2
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7
_MAX_NAME_CHARS = 64
_NOT_PREFIXED = ("event", "level", "logger", "time")
_NOT_IN_MESSAGE = ("exception", "stack", "places")
_BARE_VALUE = re.compile(r"[^\s\"'=]+")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class JournalHandler(logging.Handler):
    """Its formatter must make one JSON object per record, which is taken apart here; standard error gets the line
    as it is. ``exception`` in it is a text.
    """

    def __init__(self, path: Path | None = None, fallback_fd: int = _STDERR_FD) -> None:
        super().__init__()
        self._path = str(path or SOCKET)
        self._fallback_fd = fallback_fd
        self._socket: socket.socket | None = None
        self._num_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            fields = fields_of(json.loads(line)) | _fields_of_place(record)
        except Exception as error:
            line = unwritable_line(record, error)
            fields = fields_of(json.loads(line)) | _fields_of_place(record)
        self._tell_of_loss()
        self._num_lost += not self._write(fields, line)

    def close(self) -> None:
        with self.lock:  # type: ignore[union-attr]  # logging's own is there for as long as the handler
            self._tell_of_loss()
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        super().close()

    def _tell_of_loss(self) -> None:
        if self._num_lost:
            event = {"event": "log_lines_lost", "logger": __name__, "lost": self._num_lost}
            fields = fields_of(event) | {"PRIORITY": str(_priority(logging.WARNING))}
            if self._write(fields, json.dumps(event)):
                self._num_lost = 0

    def _write(self, fields: Mapping[str, str], line: str) -> bool:
        try:
            self._send(encode(fields))
        except OSError:  # no journal here, or it does not keep up
            return write_at_once(self._fallback_fd, f"{line}\n".encode(errors="backslashreplace"))
        return True

    def _send(self, message: bytes) -> None:
        """Unconnected, so that it survives a restart of the journal. OSError when it is not taken at once."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.sendto(message, socket.MSG_DONTWAIT, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_as_file(self._socket, message)

    def _send_as_file(self, sender: socket.socket, message: bytes) -> None:
        """What is too large for a datagram travels as a file in memory, sealed: nobody can change it."""
        fd = os.memfd_create("petalsd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(fd, "wb") as file:
            file.write(message)
            file.flush()
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))
            sender.sendmsg([], [rights], socket.MSG_DONTWAIT, self._path)


def is_journal(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether the service manager connected ``fd`` to the journal (JOURNAL_STREAM, systemd.exec(5))."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def fields_of(event: Mapping[str, Any]) -> dict[str, str]:
    """The journal's fields of an event as JSON holds it: texts as they are, anything else as JSON."""
    name, logger = str(event["event"]), str(event.get("logger", ""))
    fields = {"MESSAGE": _message(event), "SYSLOG_IDENTIFIER": IDENTIFIER, "LOGGER": logger}
    if logger.partition(".")[0] == "petalsd":
        fields["PETALSD_EVENT"] = name
        if name in MESSAGE_IDS:
            fields["MESSAGE_ID"] = MESSAGE_IDS[name]
    for key, value in event.items():
        if key not in _NOT_PREFIXED:
            fields[_field_name(key)] = _text(value)
    return fields


def encode(fields: Mapping[str, str]) -> bytes:
    """One message: a line per field, or name, little-endian length and bytes where a text has several lines."""
    return b"".join(_encoded(name, text.encode(errors="backslashreplace")) for name, text in fields.items())


def write_at_once(fd: int, data: bytes) -> bool:
    """Write all of ``data`` if that needs no waiting, whatever ``fd`` is and whoever shares it; False if not.

    A descriptor that is ready takes PIPE_BUF bytes without blocking.
    """
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    try:
        for start in range(0, len(data), select.PIPE_BUF):
            if not any(state & select.POLLOUT for _, state in ready.poll(0)):
                return False
            os.write(fd, data[start : start + select.PIPE_BUF])
    except OSError:
        return False
    return True


def unwritable_line(record: logging.LogRecord, error: BaseException) -> str:
    """What is logged in place of a record that cannot be shown; logging itself would print all that it holds."""
    event = {"event": "log_line_unwritable", "logger": record.name, "error": type(error).__name__}
    return json.dumps({**event, "place": f"{record.filename}:{record.lineno}"})


def _encoded(name: str, data: bytes) -> bytes:
    if b"\n" in data:
        return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)
    return b"%s=%s\n" % (name.encode(), data)


def _fields_of_place(record: logging.LogRecord) -> dict[str, str]:
    return {
        "PRIORITY": str(_priority(record.levelno)),
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
        "THREAD_NAME": record.threadName or "",
    }


def _priority(level: int) -> int:
    """syslog(3)'s number for a level of ``logging``."""
    return next((number for least, number in _PRIORITIES if level >= least), _DEBUG_PRIORITY)


def _message(event: Mapping[str, Any]) -> str:
    """``event key=value``, without tracebacks: a line is read at a glance, the fields have the rest."""
    shown = [(key, value) for key, value in event.items() if key not in (*_NOT_IN_MESSAGE, *_NOT_PREFIXED)]
    return " ".join(
        [_printable(str(event["event"])), *(f"{key}={_quoted(_text(value))}" for key, value in shown)]
    )


def _quoted(text: str) -> str:
    return (
        text if text.isprintable() and _BARE_VALUE.fullmatch(text) else json.dumps(text, ensure_ascii=False)
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _field_name(key: str) -> str:
    """PETALSD_KEY: capital letters, digits and underscores are all that the journal takes."""
    return re.sub(r"[^A-Z0-9_]", "_", f"PETALSD_{key.upper()}")[:_MAX_NAME_CHARS]
