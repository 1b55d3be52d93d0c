"""What a client is told when there is no answer, and the status that it comes with."""

from __future__ import annotations

from http import HTTPStatus

import structlog
from aiohttp import web

from petalsd.client.retry import is_refusal, is_too_small
from petalsd.errors import BadRequest, Overloaded, PetalsdError
from petalsd.gateway import documents

log = structlog.get_logger(__name__)

_UNAVAILABLE = HTTPStatus.SERVICE_UNAVAILABLE
_RETRY_AFTER_S = 2

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's own code, which programs act upon."""


class Refusal(Exception):
    """``code`` is for programs; ``field`` is that of the request which is wrong."""

    def __init__(self, status: HTTPStatus, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field = status, code, message, field

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """What a client may know of an error: nothing of one that nobody expected."""
        if isinstance(error, Refusal):
            return error
        if not isinstance(error, PetalsdError):
            log.error("request_failed", exc_info=error)
            return cls(
                HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "the gateway has a bug: see its log"
            )
        text = f"{error.message} ({error.hint})" if error.hint else error.message
        if isinstance(error, BadRequest):
            return cls(HTTPStatus.BAD_REQUEST, error.code, text, error.field)
        if is_too_small(error):
            return cls(
                HTTPStatus.BAD_REQUEST, CONTEXT_LENGTH_EXCEEDED, f"too many tokens: {text}", "max_tokens"
            )
        if is_refusal(error):
            return cls(HTTPStatus.BAD_REQUEST, "bad_request", text)
        status = HTTPStatus.TOO_MANY_REQUESTS if isinstance(error, Overloaded) else _UNAVAILABLE
        return cls(status, error.code, text)

    @property
    def document(self) -> documents.Document:
        kind = "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        return documents.error(self.message, self.code, kind, self.field)

    def response(self) -> web.Response:
        response = web.json_response(self.document, status=self.status)
        if self.status in (HTTPStatus.TOO_MANY_REQUESTS, _UNAVAILABLE):
            response.headers["Retry-After"] = str(_RETRY_AFTER_S)
        if self.status == HTTPStatus.UNAUTHORIZED:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response
