"""An answer as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from aiohttp import web

from petalsd.control.connection import write_in_time
from petalsd.gateway.documents import Completion, Document
from petalsd.gateway.generation import Generation
from petalsd.gateway.refusal import Refusal

_WRITE_TIMEOUT_S = 30.0
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}


async def chunks(generation: Generation, form: Completion, has_usage: bool) -> AsyncIterator[Document]:
    """The answer as it comes; nothing before its first text, so that what prevents that is no part of a stream."""
    pieces = generation.pieces()
    first = await anext(pieces, None)
    for document in form.opening():
        yield document
    if first is not None:
        yield form.chunk(first)
    async for piece in pieces:
        yield form.chunk(piece)
    yield form.closing(generation.finish_reason)
    if has_usage:
        yield form.usage_chunk(generation)


async def send_events(request: web.BaseRequest, found: AsyncIterator[Document]) -> web.StreamResponse:
    """Raises what comes instead of the first document; what comes later is the last event.

    ConnectionError when the client has gone, or does not read.
    """
    first = await anext(found)
    response = web.StreamResponse(headers=_HEADERS)
    response.force_close()  # its head says so, too
    await response.prepare(request)
    try:
        await _write(response, _event(first))
        async for document in found:
            await _write(response, _event(document))
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:
        await _write(response, _event(Refusal.of(error).document))
    else:
        await _write(response, _DONE)
    return response


def _event(document: Document) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


async def _write(response: web.StreamResponse, event: bytes) -> None:
    await write_in_time(response, event, _WRITE_TIMEOUT_S)
