"""Requests that are wrong in a hundred ways, each with the status that fits."""

from __future__ import annotations

POSTS = ("/v1/drain", "/v1/resume", "/v1/rebalance", "/v1/reload")


def post(target: str, body: bytes, length: object = None) -> bytes:
    size = len(body) if length is None else length
    return f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode() + body


def request(first: str, *headers: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (f"{first} HTTP/1.1", "Host: x", *headers, "")).encode()


def get(target: str, *headers: str) -> bytes:
    return request(f"GET {target}", *headers)


NO_HTTP = [
    b"hello\r\n\r\n", b"\x00\x01\x02\x03\r\n\r\n", b"\xff" * 100 + b"\r\n\r\n", b"GET\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\n\r\n", b"GET /v1/status HTTP/9.9\r\n\r\n", b"GET /v1/status HTTP/x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", b"{}\r\n\r\n", b"SSH-2.0-OpenSSH\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\nno colon here\r\n\r\n", b"GET /v1/status HTTP/1.1\r\n: empty\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\nBad Name: x\r\n\r\n", b"GET /v1/status HTTP/1.1\r\nX: a\x00b\r\n\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", get("/v1/status", "X: " + "a" * 20_000),
    get("/v1/status", *(f"X-{number}: y" for number in range(500))),
    post("/v1/drain", b"{}", -1), post("/v1/drain", b"{}", "ten"), post("/v1/drain", b"{}", "1e3"),
    b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
]  # fmt: skip
WRONG_PLACE = [
    (get("/"), 404), (get("/v1"), 404), (get("/v1/"), 404), (get("/v1/status/"), 404), (get("/v2/status"), 404),
    (get("/v1/../etc/passwd"), 404), (get("//v1/status"), 404), (get("/v1/status%00"), 404),
    (get("/" + "é".encode().hex() * 500), 404), (get("/V1/STATUS"), 404),
    (get("/v1/drain"), 405), (get("/v1/resume"), 405), (get("/v1/rebalance"), 405), (get("/v1/reload"), 405),
    (post("/v1/status", b""), 405), (post("/v1/sessions", b""), 405), (post("/metrics", b""), 405),
    (post("/livez", b""), 405), (post("/v1/stop", b""), 404), (request("DELETE /v1/status"), 405),
    (request("PUT /v1/drain"), 405), (request("OPTIONS *"), 404),
    (request("TRACE /v1/status"), 405), (request("PATCH /v1/reload"), 405),
    (request("CONNECT x:1"), 404),
]  # fmt: skip
NO_JSON = [
    b"{", b"}", b"nonsense", b"[1", b'{"deadline_s": }', b'{"deadline_s": 1,}', b"\xff\xfe", b"'{}'", b"{}{}",
    b'"text"', b"[]", b"1", b"null", b"true", b"[" * 60_000, b'{"a":' * 10_000, b'{"wait": tru', b"\x00",
    b'{"deadline_s": 1e999999}', b'{"wait": True}',
]  # fmt: skip
BAD_FIELDS = [
    ("/v1/drain", {"deadline_s": -1}, "deadline_s"), ("/v1/drain", {"deadline_s": "60"}, "deadline_s"),
    ("/v1/drain", {"deadline_s": True}, "deadline_s"), ("/v1/drain", {"deadline_s": [1]}, "deadline_s"),
    ("/v1/drain", {"deadline_s": 1e12}, "deadline_s"), ("/v1/drain", {"deadline_s": float("nan")}, "deadline_s"),
    ("/v1/drain", {"deadline_s": float("inf")}, "deadline_s"), ("/v1/drain", {"deadline": 60}, "deadline"),
    ("/v1/drain", {"wait": 1}, "wait"), ("/v1/drain", {"wait": "yes"}, "wait"), ("/v1/drain", {"": 1}, ""),
    ("/v1/drain", {"wait": None}, "wait"), ("/v1/resume", {"now": True}, "now"),
    ("/v1/reload", {"file": "/etc/shadow"}, "file"), ("/v1/rebalance", {"to": "15"}, "to"),
    ("/v1/rebalance", {"to": "15:3"}, "to"), ("/v1/rebalance", {"to": "-1:3"}, "to"),
    ("/v1/rebalance", {"to": [0, 15]}, "to"), ("/v1/rebalance", {"to": {"start": 0, "end": 3}}, "to"),
    ("/v1/rebalance", {"to": "0:15; rm"}, "to"), ("/v1/rebalance", {"to": ""}, "to"),
    ("/v1/rebalance", {"to": "9" * 5000 + ":" + "9" * 5001}, "to"), ("/v1/rebalance", {"dryrun": True}, "dryrun"),
    ("/v1/rebalance", {"dry_run": "true"}, "dry_run"), ("/v1/rebalance", {"To": "0:15"}, "To"),
    ("/v1/rebalance", {"to": "0:15", "x": "y" * 10_000}, "x"),
]  # fmt: skip
TOO_LARGE = [(target, b" " * 70_000) for target in POSTS] + [
    ("/v1/drain", b'{"deadline_s": ' + b"1" * 69_000 + b"}")
]
