"""HTTP over the daemon's UNIX socket: one request per connection, bounded in time and size."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from petalsd.cli.petalsctl.problems import CommandError, NoAnswer, Refused
from petalsd.paths import unix_address

_MAX_ANSWER_BYTES = 16 << 20
_MAX_LINE_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 5.0
FOLLOW_SILENCE_S = 30.0  # a followed operation sends something at least each second


class Connection:
    """Asks the daemon behind ``path``. OSError where nobody can be asked, Refused for an answer that says no."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, target: str, timeout_s: float) -> bytes:
        """The body of the answer to GET ``target``."""
        return self._ask("GET", target, None, timeout_s)

    def post(self, target: str, body: Mapping[str, Any], timeout_s: float) -> bytes:
        """The body of the answer to POST ``target``."""
        return self._ask("POST", target, body, timeout_s)

    def follow(self, target: str, body: Mapping[str, Any], timeout_s: float) -> Iterator[bytes]:
        """The lines of a streamed answer, each when it comes. Closing the iterator ends nothing in the daemon.

        ``timeout_s`` is for the first of them, before which the operation must have begun.
        """
        http_connection = _UnixHTTPConnection(self._path, timeout_s)
        try:
            response = _exchange(http_connection, "POST", target, body)
            http_connection.bound(FOLLOW_SILENCE_S)
            while line := response.readline(_MAX_LINE_BYTES):
                if line.strip():
                    yield line
        except http.client.HTTPException as error:
            raise _garbled(error) from error
        finally:
            http_connection.close()

    def _ask(self, method: str, target: str, body: Mapping[str, Any] | None, timeout_s: float) -> bytes:
        http_connection = _UnixHTTPConnection(self._path, timeout_s)
        try:
            response = _exchange(http_connection, method, target, body)
            answer = response.read(_MAX_ANSWER_BYTES + 1)
        except http.client.HTTPException as error:
            raise _garbled(error) from error
        finally:
            http_connection.close()
        if len(answer) > _MAX_ANSWER_BYTES:
            raise CommandError(f"the answer to {target} is longer than {_MAX_ANSWER_BYTES} bytes")
        return answer


class _UnixHTTPConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._connected: socket.socket | None = None

    def bound(self, timeout_s: float) -> None:
        """Wait so long, from now on, for what is still to come of the answer."""
        if self._connected is not None:  # which ``sock`` is not any more: the answer has taken it
            self._connected.settimeout(timeout_s)

    def connect(self) -> None:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(min(_CONNECT_TIMEOUT_S, self.timeout or _CONNECT_TIMEOUT_S))
            with unix_address(self._path) as address:
                connected.connect(address)
            connected.settimeout(self.timeout)
        except BaseException:
            connected.close()
            raise
        self.sock = self._connected = connected


def _exchange(
    connection: http.client.HTTPConnection, method: str, target: str, body: Mapping[str, Any] | None
) -> http.client.HTTPResponse:
    """Send the request; the answer with its body still to be read. Refused for the statuses of errors."""
    headers = {"Accept": "application/json"}
    payload = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        payload = json.dumps(body).encode()
    with contextlib.suppress(BrokenPipeError):  # refused before all was read: the answer says why
        connection.request(method, target, body=payload, headers=headers)
    response = connection.getresponse()
    if response.status >= 400:
        raise _refusal(response.status, response.read(_MAX_ANSWER_BYTES))
    return response


def _refusal(status: int, body: bytes) -> Refused:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    return Refused(status, error if isinstance(error, dict) else {}, body)


def _garbled(error: http.client.HTTPException) -> NoAnswer:
    what = str(error) or type(error).__name__
    return NoAnswer(f"the daemon closed the connection without an answer ({what})")


def is_listening(path: Path) -> bool:
    """Whether somebody accepts connections there; also True where we may not try."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            with unix_address(path) as address:
                probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True
