"""What the control socket answers to requests that are in order."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest

from petalsd import __version__
from petalsd.control.server import ControlServer
from petalsd.errors import (
    AddressUnavailable,
    BadRequest,
    ConfigError,
    Conflict,
    DeadlineExceeded,
    Draining,
    EngineError,
    NotServed,
    SwarmError,
)
from petalsd.types import BlockSpan, HostPort
from tests.cli.petalsctl.documents import PEERS, PLAN, PROGRESS, SESSIONS, STATUS
from tests.control.conftest import METRICS, Make
from tests.control.double import Answer, DaemonDouble, ask, parse


@pytest.mark.parametrize(
    ("target", "document"),
    [("/v1/status", STATUS), ("/v1/sessions", SESSIONS), ("/v1/peers", PEERS),
     ("/v1/version", {"schema_version": 1, "version": __version__})],
)  # fmt: skip
async def test_documents(target: str, document: object, server: ControlServer, path: Path) -> None:
    answer = await ask(path, "GET", target)
    assert (answer.status, answer.json) == (200, document)
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["connection"] == "close"


async def test_a_head_has_no_body(server: ControlServer, path: Path) -> None:
    answer = await ask(path, "HEAD", "/v1/status")
    assert (answer.status, answer.body) == (200, b"")


async def test_metrics_and_health(server: ControlServer, daemon: DaemonDouble, path: Path) -> None:
    """Alive and ready are two things: a restart helps only where the first one fails."""
    assert (await ask(path, "GET", "/metrics")).body == METRICS
    assert (await ask(path, "GET", "/livez")).status == 200
    assert (await ask(path, "GET", "/readyz")).status == 200
    daemon.is_ready, daemon.state = False, "draining"
    answer = await ask(path, "GET", "/readyz")
    assert (answer.status, answer.json["error"]["message"]) == (503, "the daemon is draining")
    assert answer.json["error"]["hint"] == "petalsctl -i demo wait --ready"
    assert (await ask(path, "GET", "/livez")).status == 200
    daemon.problem = "the engine does not come back"
    answer = await ask(path, "GET", "/livez")
    assert (answer.status, answer.json["error"]["message"]) == (503, "the engine does not come back")


async def test_operations(server: ControlServer, daemon: DaemonDouble, path: Path) -> None:
    """Each with its fields; an absent body is an empty object."""
    assert (await ask(path, "POST", "/v1/drain", {"deadline_s": 30})).status == 200
    assert (await ask(path, "POST", "/v1/drain")).json["operation"] == "drain"
    assert (await ask(path, "POST", "/v1/resume", {})).json["operation"] == "resume"
    assert (await ask(path, "POST", "/v1/reload")).json["applied"] == ["daemon.log_level"]
    assert (await ask(path, "POST", "/v1/rebalance", {"to": "15:30"})).json == PLAN
    assert (await ask(path, "POST", "/v1/rebalance", {"dry_run": True})).json == PLAN
    assert daemon.calls == [
        ("drain", 30.0), ("drain", None), ("resume", None), ("reload", None),
        ("rebalance", BlockSpan(15, 30)), ("plan", None),
    ]  # fmt: skip


async def test_an_operation_can_be_followed(server: ControlServer, daemon: DaemonDouble, path: Path) -> None:
    """A line of JSON each half second, the last one has ``done``."""
    daemon.progresses = [PROGRESS, PROGRESS | {"sessions_left": 1}, PROGRESS | {"done": True}]
    wanted = list(daemon.progresses)
    answer = await ask(path, "POST", "/v1/drain", {"wait": True})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in answer.body.splitlines()] == wanted


async def test_a_follower_that_leaves_ends_its_stream_alone(
    server: ControlServer, daemon: DaemonDouble, path: Path
) -> None:
    """Nothing is called off, and its place is free again."""
    daemon.progresses = [PROGRESS]
    for _ in range(3):
        reader, writer = await asyncio.open_unix_connection(str(path))
        body = b'{"wait": true}'
        writer.write(
            b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await asyncio.wait_for(reader.readuntil(b"\n"), 20)
        writer.close()
        await writer.wait_closed()
    assert daemon.acts == [("drain", None)] * 3
    assert (await ask(path, "GET", "/v1/status")).status == 200


async def test_a_move_that_is_not_needed_is_no_stream(
    server: ControlServer, daemon: DaemonDouble, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, with the reason as its outcome."""
    plan = await daemon.plan(None)

    async def stay(to: BlockSpan | None) -> object:
        return plan.model_copy(update={"would_move": False, "explanation": "too little gain"})

    monkeypatch.setattr(daemon, "rebalance", stay)
    answer = await ask(path, "POST", "/v1/rebalance", {"wait": True})
    (line,) = answer.body.splitlines()
    assert json.loads(line)["outcome"] == "too little gain"


@pytest.mark.parametrize(
    ("error", "status"),
    [(BadRequest("to", "0:99", "the model has the blocks 0:30"), 400), (ConfigError("bad file"), 422),
     (Conflict("not now", hint="wait"), 409), (DeadlineExceeded("late"), 504), (Draining("going"), 503),
     (NotServed("none"), 503), (SwarmError("alone"), 503), (EngineError("broken"), 500)],
)  # fmt: skip
async def test_errors_have_one_form(
    error: Conflict, status: int, server: ControlServer, daemon: DaemonDouble, path: Path
) -> None:
    daemon.failures["rebalance"] = error
    answer = await ask(path, "POST", "/v1/rebalance", {})
    text = {"code": error.code, "message": error.message, "hint": error.hint, "acting_group": None}
    assert (answer.status, answer.json) == (status, {"error": text})


async def test_a_bug_is_not_shown(server: ControlServer, daemon: DaemonDouble, path: Path) -> None:
    """Neither its text, which may hold anything, nor a traceback; and the next request is answered."""
    daemon.failures["status"] = RuntimeError("secret")
    answer = await ask(path, "GET", "/v1/status")
    assert (answer.status, answer.json["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in answer.body and b"Traceback" not in answer.body
    del daemon.failures["status"]
    assert (await ask(path, "GET", "/v1/status")).status == 200


async def test_on_the_network_there_is_only_what_everybody_may_read(
    server: ControlServer, daemon: DaemonDouble
) -> None:
    (address,) = server.metrics_addresses

    async def get(request: str) -> Answer:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(f"{request} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        try:
            return parse(await asyncio.wait_for(reader.read(), 20))
        finally:
            writer.close()

    assert (await get("GET /metrics")).body == METRICS
    assert (await get("GET /readyz")).status == 200
    for hidden in ("GET /v1/status", "GET /v1/sessions", "POST /v1/drain", "POST /v1/reload"):
        assert (await get(hidden)).status == 404
    assert daemon.acts == []


async def test_an_address_that_cannot_be_had_is_named(make: Make, path: Path) -> None:
    """And nothing is left behind: neither the socket nor its file."""
    taken = make(HostPort("127.0.0.1", 0))
    await taken.start()
    (address,) = taken.metrics_addresses
    try:
        other = make(address)
        other._socket_file.path = path.with_name("other.sock")
        with pytest.raises(AddressUnavailable) as raised:
            await other.start()
        assert raised.value.message == f"metrics.listen = '{address}': {os.strerror(errno.EADDRINUSE)}"
        assert f"ss -ltnp sport = :{address.port}" in raised.value.hint
        assert sorted(os.listdir(path.parent)) == ["control.sock", "control.sock.lock", "other.sock.lock"]
    finally:
        await taken.stop()


@pytest.mark.parametrize(
    ("address", "kind"),
    [(HostPort("192.0.2.7", 0), AddressUnavailable), (HostPort("no host", 9464), ConfigError)],
)
async def test_what_may_come_later_is_told_from_what_cannot_be(
    address: HostPort, kind: type[Exception], make: Make
) -> None:
    """The address of a VPN is there some time after the boot."""
    with pytest.raises(kind, match=rf"^{kind.code}: metrics.listen = '{address}': ") as raised:
        await make(address).start()
    assert type(raised.value) is kind


async def test_a_stop_ends_followers_and_removes_the_file(
    make: Make, daemon: DaemonDouble, path: Path
) -> None:
    daemon.progresses = [PROGRESS]
    server = make()
    await server.start()
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b'POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n{"wait": true}')
    await asyncio.wait_for(reader.readuntil(b"\n"), 20)
    await asyncio.wait_for(server.stop(), 20)
    assert os.listdir(path.parent) == ["control.sock.lock"]
    await asyncio.wait_for(reader.read(), 20)
    assert reader.at_eof()
    writer.close()
    await server.stop()
