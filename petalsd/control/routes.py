"""Method and path to what is done, for whom; and every failure to its HTTP status."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel, ValidationError

from petalsd.control.access import Access
from petalsd.control.connection import (
    MAX_BODY_BYTES,
    REQUEST_TIMEOUT_S,
    Connection,
    error_response,
    parse_json_object,
    read_body,
    refusal,
)
from petalsd.errors import (
    BadRequest,
    ConfigError,
    Conflict,
    DeadlineExceeded,
    Draining,
    NotServed,
    PetalsdError,
    SwarmError,
)

log = structlog.get_logger(__name__)

_STATUSES: tuple[tuple[type[PetalsdError], HTTPStatus], ...] = (
    (BadRequest, HTTPStatus.BAD_REQUEST),
    (ConfigError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (Conflict, HTTPStatus.CONFLICT),
    (DeadlineExceeded, HTTPStatus.GATEWAY_TIMEOUT),
    (Draining, HTTPStatus.SERVICE_UNAVAILABLE),
    (NotServed, HTTPStatus.SERVICE_UNAVAILABLE),
    (SwarmError, HTTPStatus.SERVICE_UNAVAILABLE),
)
_R = TypeVar("_R", bound=BaseModel)

# Answers a request whose body has been read.
Action = Callable[[web.BaseRequest, bytes], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """``is_act``: changes something, so not for everybody."""

    action: Action
    is_act: bool = False


class Router:
    """``access`` None: nobody may act here, as on a network socket."""

    def __init__(self, routes: Mapping[tuple[str, str], Route], access: Access | None) -> None:
        self._routes = routes
        self._access = access

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Never raises but for a cancellation."""
        try:
            route = self._find(request)
            if isinstance(route, web.Response):
                return route
            if route.is_act and (denial := self._denial(request)) is not None:
                return denial
            body = await read_body(request)
            return await route.action(request, body)
        except web.HTTPRequestEntityTooLarge:
            text = f"the body is larger than {MAX_BODY_BYTES} bytes"
            return error_response(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "bad_request", text)
        except web.HTTPRequestTimeout:
            text = f"the body did not come within {REQUEST_TIMEOUT_S:g} s"
            return error_response(HTTPStatus.REQUEST_TIMEOUT, "deadline_exceeded", text)
        except web.RequestPayloadError as error:
            return error_response(HTTPStatus.BAD_REQUEST, "bad_request", f"the body cannot be read: {error}")
        except PetalsdError as error:
            return refusal(error, status_of(error))
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client has gone
        except Exception:
            log.exception("control_request_failed", method=request.method, path=request.path)
            text = "the daemon has a bug: its log has the details"
            return error_response(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", text)

    def _find(self, request: web.BaseRequest) -> Route | web.Response:
        method = "GET" if request.method == "HEAD" else request.method
        route = self._routes.get((method, request.path))
        if route is not None:
            return route
        allowed = sorted(known for known, path in self._routes if path == request.path)
        if not allowed:
            paths = ", ".join(sorted({path for _, path in self._routes}))
            return error_response(
                HTTPStatus.NOT_FOUND, "not_found", f"there is no {_short(request.path)}", f"there are {paths}"
            )
        text = f"{_short(request.method)} {request.path}: only {' and '.join(allowed)} is possible"
        response = error_response(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed", text)
        response.headers["Allow"] = ", ".join(allowed)
        return response

    def _denial(self, request: web.BaseRequest) -> web.Response | None:
        connection = request.protocol
        assert isinstance(connection, Connection)
        peer, access = connection.peer, self._access
        if access is not None and peer is not None and access.may_act(peer):
            log.info("control_request", path=request.path, pid=peer.pid, uid=peer.uid)
            return None
        uid = None if peer is None else peer.uid
        log.warning("control_request_denied", path=request.path, uid=uid)
        who, group = ("nobody on this socket", None) if access is None else (access.actors, access.group)
        text = f"{request.path}: only for {who}"
        return error_response(HTTPStatus.FORBIDDEN, "forbidden", text, acting_group=group)


def status_of(error: PetalsdError) -> HTTPStatus:
    """Bad configurations are the client's to mend, absences pass, the rest is ours."""
    return next(
        (status for kind, status in _STATUSES if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR
    )


def parse_request(kind: type[_R], body: bytes) -> _R:
    """The body as ``kind``; BadRequest names the field, its value and the rule."""
    try:
        return kind.model_validate(parse_json_object(body))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:1]) or "body"
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields) or "none"
            raise BadRequest(field, first["input"], f"there is no such field; known are: {known}") from None
        raise BadRequest(field, first["input"], first["msg"].removeprefix("Value error, ")) from None
    except ValueError as error:
        raise BadRequest("body", body[:80], str(error)) from None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
