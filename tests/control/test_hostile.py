"""A hundred wrong requests: each gets the error that fits, none reaches the daemon, a good one is served next."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from petalsd.control import connection, routes
from petalsd.control.server import ControlServer
from tests.control.double import DaemonDouble, ask, parse, send
from tests.control.hostile import BAD_FIELDS, NO_HTTP, NO_JSON, TOO_LARGE, WRONG_PLACE, get, post
from tests.waiting import eventually


def test_there_are_a_hundred() -> None:
    """Together with the slow and the unprivileged ones below."""
    assert len(NO_HTTP + WRONG_PLACE + NO_JSON + BAD_FIELDS + TOO_LARGE) >= 100


@pytest.fixture(autouse=True)
async def unharmed(server: ControlServer, daemon: DaemonDouble, path: Path) -> object:
    """After each: nothing was done, and a good request is answered at once."""
    yield
    assert daemon.acts == []
    async with asyncio.timeout(5):
        assert (await ask(path, "GET", "/v1/status")).json["state"] == "online"


@pytest.mark.parametrize("data", NO_HTTP, ids=range(len(NO_HTTP)))
async def test_what_is_no_http(data: bytes, path: Path) -> None:
    answer = parse(await send(path, data, is_open=True))
    assert answer.status == 400
    assert answer.json["error"]["code"] == "bad_request"
    assert b"Traceback" not in answer.body and b".py" not in answer.body


@pytest.mark.parametrize(("data", "status"), WRONG_PLACE, ids=range(len(WRONG_PLACE)))
async def test_what_is_not_there(data: bytes, status: int, path: Path) -> None:
    """A path that is unknown, or a method that it does not have: the answer says which there are."""
    answer = parse(await send(path, data, is_open=True))
    assert answer.status == status
    error = answer.json["error"]
    assert error["code"] == ("not_found" if status == 404 else "method_not_allowed")
    assert len(answer.body) < 1000
    assert error["hint"].startswith("there are /") if status == 404 else answer.headers["allow"]


@pytest.mark.parametrize("body", NO_JSON, ids=range(len(NO_JSON)))
async def test_what_is_no_json_object(body: bytes, path: Path) -> None:
    answer = await ask(path, "POST", "/v1/drain", body)
    assert answer.status == 400
    assert answer.json["error"]["code"] == "bad_request"
    assert len(answer.body) < 1000


@pytest.mark.parametrize(("target", "body", "field"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
async def test_fields_that_are_wrong(target: str, body: object, field: str, path: Path) -> None:
    """The answer names the field; a misspelt one is an error, and the known ones are listed."""
    answer = await ask(path, "POST", target, body)
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith(f"{field or 'body'} = ")
    assert len(answer.body) < 1000


@pytest.mark.parametrize(("target", "body"), TOO_LARGE, ids=range(len(TOO_LARGE)))
async def test_what_is_too_large(target: str, body: bytes, path: Path) -> None:
    """Refused by its claim alone, and by its length where it makes none."""
    assert (await ask(path, "POST", target, body)).status == 413
    claim = post(target, b"", 1 << 40)
    assert parse(await send(path, claim, is_open=True)).status == 413
    chunked = f"POST {target} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    assert parse(await send(path, chunked + chunk, is_open=True)).status == 413


@pytest.mark.parametrize(
    "data", [b"", b"G", b"GET /v1/status HTTP/1.1\r\n", b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: "]
)
async def test_a_head_that_does_not_come(data: bytes, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.1)
    answer = parse(await send(path, data, is_open=True))
    assert (answer.status, answer.json["error"]["code"]) == (408, "deadline_exceeded")


@pytest.mark.parametrize("data", [post("/v1/drain", b"", 10), post("/v1/drain", b'{"wait"', 20)])
async def test_a_body_that_does_not_come(data: bytes, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.1)
    monkeypatch.setattr(routes, "REQUEST_TIMEOUT_S", 0.1)
    answer = parse(await send(path, data, is_open=True))
    assert (answer.status, answer.json["error"]["message"]) == (408, "the body did not come within 0.1 s")


@pytest.mark.parametrize(
    "data", [b"", b"GET /v1/sta", get("/v1/status")[:-2], post("/v1/drain", b'{"wai', 30)]
)
async def test_a_client_that_hangs_up_in_the_middle(data: bytes, path: Path) -> None:
    """Whatever it is told, nothing is done."""
    _, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_hangs_up_before_its_answer(daemon: DaemonDouble, path: Path) -> None:
    daemon.delay_s = 0.05
    for _ in range(20):
        _, writer = await asyncio.open_unix_connection(str(path))
        writer.write(get("/v1/peers"))
        await writer.drain()
        writer.close()


async def test_an_exchange_that_never_ends_is_cut_off(
    daemon: DaemonDouble, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "EXCHANGE_TIMEOUT_S", 0.1)
    daemon.delay_s = 600
    assert await send(path, get("/v1/peers"), is_open=True) == b""


async def test_only_one_request_each(daemon: DaemonDouble, path: Path) -> None:
    """A second one on the same connection is not even looked at."""
    data = await send(path, get("/v1/version") + post("/v1/drain", b"{}"), is_open=True)
    assert data.count(b"HTTP/1.1 ") == 1
    assert data.startswith(b"HTTP/1.1 200")


async def test_more_connections_than_there_is_room_for(path: Path) -> None:
    """Those above the bound are told so; when the others go there is room again."""
    held = [await asyncio.open_unix_connection(str(path)) for _ in range(connection.MAX_CONNECTIONS)]
    try:
        answer = parse(await send(path, get("/v1/status"), is_open=True))
        assert (answer.status, answer.json["error"]["code"]) == (503, "overloaded")
    finally:
        for _, writer in held:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in held))

    async def has_room() -> bool:
        return parse(await send(path, get("/v1/status"), is_open=True)).status != 503

    await eventually(has_room)


async def test_random_bytes(path: Path) -> None:
    """A few hundred strings of no kind at all."""
    import random

    rng = random.Random(0)
    for _ in range(200):
        data = rng.randbytes(rng.randint(1, 300))
        answer = await send(path, data)
        assert answer == b"" or parse(answer).status in (400, 408)


def test_errors_are_the_published_document() -> None:
    """Also those that are written without the HTTP library."""
    error = json.loads(connection.error_body("code", "message", "hint"))
    assert error == {"error": {"code": "code", "message": "message", "hint": "hint", "acting_group": None}}
