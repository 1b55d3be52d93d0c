"""A small HTTP server on loopback that answers like the Hub, and can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" * 6 + "beef"


@dataclass
class FakeHub:
    """Serves the files of ``directory`` as repository ``acme/tiny``; safetensors files carry a sha256.

    break_after   bytes after which the connection of the next download of a file is cut, by file, once each
    corrupt       files that are served with one byte changed
    padded        files that are served with one byte more
    refused       files that are answered with this status
    requires      the token without which everything is refused
    is_down       True: every answer is 503
    lookup        status and body of the answer to every lookup, instead of the right one
    downloads     (file, first byte) of every download that was begun
    tokens        Authorization header of every request
    """

    directory: Path
    break_after: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    padded: set[str] = field(default_factory=set)
    refused: dict[str, int] = field(default_factory=dict)
    requires: str | None = None
    is_down: bool = False
    lookup: tuple[int, bytes] | None = None
    downloads: list[tuple[str, int]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)

    repository = "acme/tiny"

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloaded(self) -> set[str]:
        return {file for file, _ in self.downloads}

    def describe(self) -> dict[str, Any]:
        """What ``/api/models/<repository>/revision/<revision>?blobs=true`` answers."""
        return {
            "id": self.repository,
            "modelId": self.repository,
            "sha": COMMIT,
            "siblings": [_sibling(path) for path in sorted(self.directory.iterdir())],
        }


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub

    def do_GET(self) -> None:
        self.fake.tokens.append(self.headers.get("Authorization"))
        path, _, query = self.path.partition("?")
        if self.fake.is_down:
            self._answer(503, b"down")
        elif self.fake.requires and self.headers.get("Authorization") != f"Bearer {self.fake.requires}":
            self._answer(401, b"who are you?")
        elif path == f"/api/models/{self.fake.repository}/revision/main" and "blobs" in query:
            self._answer(*(self.fake.lookup or (200, json.dumps(self.fake.describe()).encode())))
        elif path.startswith(f"/{self.fake.repository}/resolve/{COMMIT}/"):
            self._send_file(path.rpartition("/")[2])
        else:
            self._answer(404, b"not here")

    def _send_file(self, name: str) -> None:
        content = bytearray((self.fake.directory / name).read_bytes())
        if name in self.fake.corrupt:
            content[-1] ^= 1
        if name in self.fake.padded:
            content.append(0)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.fake.downloads.append((name, start))
        if name in self.fake.refused:
            self._answer(self.fake.refused[name], b"no")
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        limit = self.fake.break_after.pop(name, None)
        self.wfile.write(content[start:] if limit is None else content[start : start + limit])
        self.close_connection = True

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are recorded in the FakeHub, not printed."""


def _sibling(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    sibling: dict[str, Any] = {"rfilename": path.name, "size": len(content), "blobId": blob}
    if path.suffix == ".safetensors":
        digest = hashlib.sha256(content).hexdigest()
        sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return sibling
