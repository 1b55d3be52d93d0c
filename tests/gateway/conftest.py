"""A tiny model over a real server, behind a gateway that listens on loopback."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from petalsd.client.model import RemoteCausalLM
from petalsd.gateway.service import Gateway, GatewayOptions
from petalsd.types import HostPort
from tests.client.live_server import PREFIX, in_threads
from tests.tiny_models import make_tiny, make_tokenizer

NAME = "tiny"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "w1 {{ message.content }} w2 {% endfor %}"
)
OPTIONS = GatewayOptions(NAME, HostPort("127.0.0.1", 0))


@dataclass
class Tiny:
    """The remote model, the same one here, and their tokenizer of 256 words."""

    path: Path
    maddr: str
    remote: RemoteCausalLM
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def continued(self, prompt: str, tokens: int) -> list[str]:
        """The likeliest words after a prompt, as transformers computes them."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = self.reference.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(output[0, ids.shape[1] :]).split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    path = tmp_path_factory.mktemp("gateway") / "tiny-llama"
    reference, tokenizer = make_tiny("llama", path), make_tokenizer(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    with in_threads(path, "0:4") as (server,):
        remote = RemoteCausalLM.from_pretrained(
            path, initial_peers=[server.maddr], dht_prefix=PREFIX, dtype=torch.float32
        )
        with remote:
            yield Tiny(path, server.maddr, remote, reference, tokenizer)


class Asking:
    """A client of one gateway."""

    def __init__(self, session: aiohttp.ClientSession, gateway: Gateway) -> None:
        self.session = session
        self.gateway = gateway

    async def get(self, path: str, **more: Any) -> tuple[int, Any]:
        async with self.session.get(path, **more) as response:
            return response.status, await response.json()

    async def post(self, path: str, **fields: object) -> tuple[int, Any]:
        async with self.session.post(path, json=fields) as response:
            return response.status, await response.json()

    async def stream(self, path: str, **fields: object) -> list[Any]:
        """All documents of a stream, and DONE."""
        async with self.session.post(path, json={"stream": True, **fields}) as response:
            assert (response.status, response.content_type) == (200, "text/event-stream"), (
                await response.text()
            )
            events = (await response.text()).split("\n\n")
        assert events.pop() == "" and all(event.startswith("data: ") for event in events)
        data = [event.removeprefix("data: ") for event in events]
        return [json.loads(text) if text != "[DONE]" else text for text in data]


class Serve(Protocol):
    def __call__(self, model: Any = None, **options: Any) -> AbstractAsyncContextManager[Asking]: ...


@pytest.fixture
def serve(tiny: Tiny) -> Serve:
    """A gateway to the tiny model, or to a double of one."""

    @asynccontextmanager
    async def serving(model: Any = None, **options: Any) -> AsyncIterator[Asking]:
        gateway = Gateway(model or tiny.remote, tiny.tokenizer, replace(OPTIONS, **options))
        (address,) = await gateway.start()
        try:
            async with aiohttp.ClientSession(f"http://{address}") as session:
                yield Asking(session, gateway)
        finally:
            await gateway.stop(deadline_s=0.0)

    return serving
