"""A control socket that answers what a test put there."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

HANG_UP = object()
Answer = tuple[int, bytes | Iterable[bytes]]


@dataclass
class FakeDaemon:
    """``answers`` by method and target: a document, or a function that makes (status, body).

    A body that is not bytes is streamed, one chunk per item; HANG_UP ends the connection without a word.
    ``requests`` holds (method, target, body) as they came; ``hung_up`` is set when a reader of a stream left.
    """

    path: Path
    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        daemon = self

        class Handler(_Handler):
            fake = daemon

        self._server = _Server(str(self.path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """As a daemon that ends in order: the socket goes."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
        self.path.unlink(missing_ok=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    fake: FakeDaemon
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.fake.requests.append((self.command, self.path, json.loads(raw) if raw else None))
        answer = self.fake.answers.get(f"{self.command} {self.path}")
        if answer is HANG_UP:
            self.close_connection = True
            return
        if answer is None:
            error = {"error": {"code": "not_found", "message": f"no {self.path}", "hint": ""}}
            status, body = 404, json.dumps(error).encode()
        elif callable(answer):
            made: Callable[[], Answer] = answer
            status, body = made()
        else:
            status, body = 200, json.dumps(answer).encode()
        self.send_response(status)
        if isinstance(body, bytes):
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            self._stream(body)

    def _stream(self, chunks: Iterable[bytes]) -> None:
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for chunk in chunks:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.fake.hung_up.set()
        self.close_connection = True


def refusal(status: int, code: str, message: str, hint: str = "", **more: Any) -> Callable[[], Answer]:
    """An answer that says no, in the daemon's form; ``more`` is what later versions say beside."""
    body = json.dumps({"error": {"code": code, "message": message, "hint": hint, **more}}).encode()
    return lambda: (status, body)


def lines(*documents: dict[str, Any]) -> Callable[[], Answer]:
    """A streamed answer of one document per line."""
    return lambda: (200, [json.dumps(document).encode() + b"\n" for document in documents])
