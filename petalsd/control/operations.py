"""The calls behind the routes; long operations can be followed as newline-delimited JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import web
from pydantic import BaseModel

from petalsd import __version__
from petalsd.control.api import DaemonApi, Operation, ServerApi
from petalsd.control.connection import Connection, error_response, write_in_time
from petalsd.control.routes import Action, Route, parse_request
from petalsd.status import DrainRequest, NoFields, Progress, RebalanceRequest, Version

_PERIOD_S = 0.5
_WRITE_TIMEOUT_S = 10.0
_NDJSON = "application/x-ndjson"

Exposition = Callable[[], tuple[bytes, str]]


class Operations:
    """``routes`` for the control socket, ``public_routes`` for listeners that everybody may reach: those of every
    daemon.

    ``exposition`` makes the metrics' text and its content type.
    """

    def __init__(self, api: DaemonApi, exposition: Exposition) -> None:
        self._daemon = api
        self._exposition = exposition

    def routes(self) -> dict[tuple[str, str], Route]:
        return self.public_routes() | {
            ("GET", "/v1/status"): Route(_get(self._daemon.status)),
            ("GET", "/v1/version"): Route(_get(lambda: Version(version=__version__))),
            ("GET", "/v1/peers"): Route(self._peers),
            ("POST", "/v1/reload"): Route(self._reload, is_act=True),
        }

    def public_routes(self) -> dict[tuple[str, str], Route]:
        return {
            ("GET", "/metrics"): Route(self._metrics),
            ("GET", "/livez"): Route(self._livez),
            ("GET", "/readyz"): Route(self._readyz),
        }

    async def _peers(self, request: web.BaseRequest, body: bytes) -> web.Response:
        return _json(await self._daemon.peers())

    async def _metrics(self, request: web.BaseRequest, body: bytes) -> web.Response:
        text, content_type = self._exposition()
        return web.Response(body=text, headers={"Content-Type": content_type})

    async def _livez(self, request: web.BaseRequest, body: bytes) -> web.Response:
        """Whether a restart would help; not whether anything is served."""
        problem = self._daemon.problem
        if problem is None:
            return web.Response(text="ok\n")
        return error_response(HTTPStatus.SERVICE_UNAVAILABLE, "not_alive", problem, "restart the daemon")

    async def _readyz(self, request: web.BaseRequest, body: bytes) -> web.Response:
        if self._daemon.is_ready:
            return web.Response(text="ok\n")
        status = self._daemon.status()
        text, hint = f"the daemon is {status.state}", f"petalsctl -i {status.instance} wait --ready"
        return error_response(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", text, hint)

    async def _reload(self, request: web.BaseRequest, body: bytes) -> web.Response:
        parse_request(NoFields, body)
        return _json(await self._daemon.reload())


class ServerOperations(Operations):
    """Also those of a daemon that serves blocks."""

    def __init__(self, api: ServerApi, exposition: Exposition) -> None:
        super().__init__(api, exposition)
        self._api = api

    def routes(self) -> dict[tuple[str, str], Route]:
        return super().routes() | {
            ("GET", "/v1/sessions"): Route(_get(self._api.sessions)),
            ("POST", "/v1/drain"): Route(self._drain, is_act=True),
            ("POST", "/v1/resume"): Route(self._resume, is_act=True),
            ("POST", "/v1/rebalance"): Route(self._rebalance, is_act=True),
        }

    async def _drain(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        asked = parse_request(DrainRequest, body)
        await self._api.drain(asked.deadline_s)
        return await self._follow(request, "drain") if asked.wait else _json(self._api.progress("drain"))

    async def _resume(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        parse_request(NoFields, body)
        await self._api.resume()
        return _json(self._api.progress("resume"))

    async def _rebalance(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        asked = parse_request(RebalanceRequest, body)
        if asked.dry_run:
            return _json(await self._api.plan(asked.to))
        plan = await self._api.rebalance(asked.to)
        if not asked.wait:
            return _json(plan)
        if plan.would_move:
            return await self._follow(request, "rebalance")
        return _ndjson(self._api.progress("rebalance").model_copy(update={"outcome": plan.explanation}))

    async def _follow(self, request: web.BaseRequest, operation: Operation) -> web.StreamResponse:
        """A line every half second; the last one has ``done``. Returns when it is written.

        A follower that leaves ends nothing but its own stream.
        """
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.unbound()
        response = web.StreamResponse(headers={"Content-Type": _NDJSON})
        response.force_close()
        await response.prepare(request)
        while True:
            progress = self._api.progress(operation)
            await write_in_time(response, _serialized(progress), _WRITE_TIMEOUT_S)
            if progress.done:
                break
            await asyncio.sleep(_PERIOD_S)
        await response.write_eof()
        return response


def _get(make: Callable[[], BaseModel]) -> Action:
    async def answer(request: web.BaseRequest, body: bytes) -> web.Response:
        return _json(make())

    return answer


def _json(document: BaseModel) -> web.Response:
    return web.Response(body=_serialized(document), content_type="application/json")


def _ndjson(only: Progress) -> web.Response:
    return web.Response(body=_serialized(only), content_type=_NDJSON)


def _serialized(document: BaseModel) -> bytes:
    """On one line, ended."""
    return document.model_dump_json(by_alias=True).encode() + b"\n"
