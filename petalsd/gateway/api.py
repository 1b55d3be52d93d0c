"""The interface: which path does what, for whom, and every failure to its status and OpenAI's form of an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import structlog
from aiohttp import web

from petalsd.control.connection import Connection, read_body
from petalsd.errors import MissingBlocks
from petalsd.gateway import documents
from petalsd.gateway.events import chunks, send_events
from petalsd.gateway.generation import Generators, Prompt
from petalsd.gateway.keys import Keys
from petalsd.gateway.prompts import Prompts
from petalsd.gateway.refusal import Refusal
from petalsd.gateway.requests import ChatRequest, CompletionRequest, GenerationRequest, parse_generation

log = structlog.get_logger(__name__)

_MAX_BODY_BYTES = 4 << 20

_Action = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Api:
    """Answers requests for one model, which goes by ``name``.

    missing_blocks  those that nobody serves now
    """

    def __init__(
        self,
        name: str,
        prompts: Prompts,
        generators: Generators,
        keys: Keys,
        missing_blocks: Callable[[], MissingBlocks | None],
    ) -> None:
        self._name = name
        self._prompts = prompts
        self._generators = generators
        self._keys = keys
        self._missing_blocks = missing_blocks
        self._created = int(time.time())
        self._routes: dict[tuple[str, str], _Action] = {
            ("GET", "/health"): self._health,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/chat/completions"): self._chat,
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Never raises but for a client that has gone."""
        try:
            return await self._find(request)(request)
        except web.HTTPRequestEntityTooLarge:
            text = f"the body is larger than {_MAX_BODY_BYTES} bytes"
            refusal = Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "bad_request", text)
        except web.HTTPRequestTimeout:
            refusal = Refusal(
                HTTPStatus.REQUEST_TIMEOUT, "deadline_exceeded", "the body did not come in time"
            )
        except web.RequestPayloadError as error:
            refusal = Refusal(HTTPStatus.BAD_REQUEST, "bad_request", f"the body cannot be read: {error}")
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client has gone
        except Exception as error:
            refusal = Refusal.of(error)
        status, path = int(refusal.status), request.path[:80]
        log.info("refused", path=path, status=status, code=refusal.code, field=refusal.field)
        return refusal.response()

    def _find(self, request: web.BaseRequest) -> _Action:
        method = "GET" if request.method == "HEAD" else request.method
        action = self._routes.get((method, request.path))
        if action is None:
            paths = ", ".join(f"{method} {path}" for method, path in self._routes)
            text = f"there is no {request.method[:16]} {request.path[:80]}; there are {paths}"
            raise Refusal(HTTPStatus.NOT_FOUND, "not_found", text)
        if action != self._health and not self._keys.admit(request.headers.get("Authorization")):
            text = "this gateway wants a key: Authorization: Bearer KEY"
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid_api_key", text)
        # A page of a browser can send other types to any address without asking it first.
        if method == "POST" and request.content_type != "application/json":
            text = f"Content-Type: application/json is needed, got {request.content_type[:80]}"
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "bad_request", text)
        return action

    async def _health(self, request: web.BaseRequest) -> web.Response:
        missing = self._missing_blocks()
        if missing is not None:
            raise missing
        return web.json_response({"status": "ok", "running": self._generators.num_running})

    async def _models(self, request: web.BaseRequest) -> web.Response:
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "petalsd"}
        return web.json_response({"object": "list", "data": [model]})

    async def _complete(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = parse_generation(CompletionRequest, await read_body(request, _MAX_BODY_BYTES))
        prompt = await asyncio.to_thread(self._prompts.of_text, asked)
        return await self._answer(request, asked, prompt, documents.Completion(self._name))

    async def _chat(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = parse_generation(ChatRequest, await read_body(request, _MAX_BODY_BYTES))
        prompt = await asyncio.to_thread(self._prompts.of_chat, asked)
        return await self._answer(request, asked, prompt, documents.Chat(self._name))

    async def _answer(
        self, request: web.BaseRequest, asked: GenerationRequest, prompt: Prompt, form: documents.Completion
    ) -> web.StreamResponse:
        if asked.model not in (None, self._name):
            text = f"model = {asked.model!r}: this gateway has {self._name}"
            raise Refusal(HTTPStatus.NOT_FOUND, "model_not_found", text, "model")
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.unbound()  # it lasts as long as it lasts
        generation, start_s = self._generators.start(prompt), time.monotonic()
        try:
            if asked.stream:
                return await send_events(request, chunks(generation, form, asked.has_usage_at_end))
            text = "".join([piece async for piece in generation.pieces()])
            return web.json_response(form.whole(text, generation))
        finally:
            generation.cancel()
            counts = {"prompt_tokens": generation.num_prompt_tokens, "tokens": generation.num_tokens}
            log.info("answered", **counts, seconds=round(time.monotonic() - start_s, 3))
