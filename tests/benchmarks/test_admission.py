"""What counts as a session that is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from hivemind.p2p import P2PHandlerError

from benchmarks.providers import Job, Provider
from benchmarks.suite import admission
from petalsd.types import BlockSpan
from tests.tiny_models import make_tiny


class Server:
    """Has room for ``room`` sessions; with ``dies`` it ends when one more comes, and all that it has with it."""

    def __init__(self, room: int, dies: bool) -> None:
        self.room = room
        self.dies = dies
        self.is_dead = False

    @contextlib.asynccontextmanager
    async def connect(self, maddr: str) -> AsyncIterator[Server]:
        yield self

    @contextlib.asynccontextmanager
    async def stream(self, uid: str, max_length: int) -> AsyncIterator[Stream]:
        self.room -= 1
        yield Stream(self, self.room < 0)


class Stream:
    def __init__(self, server: Server, is_refused: bool) -> None:
        self._server = server
        self._is_refused = is_refused

    async def step(self, hidden: torch.Tensor) -> None:
        self._server.is_dead |= self._is_refused and self._server.dies
        if self._server.is_dead:
            raise ConnectionResetError("the server has gone")
        if self._is_refused:
            raise P2PHandlerError("out_of_pages")


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    make_tiny("llama", tmp_path / "model")
    return Provider("petalsd", "", Job(tmp_path / "model", BlockSpan(0, 1), 1), tmp_path)


def test_sessions_until_the_first_refusal(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "connect", Server(room=3, dies=False).connect)
    assert asyncio.run(admission.count_admitted(provider, [300] * 9)) == 3


def test_a_server_that_dies_refuses_nothing(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many sessions it had by then is no figure."""
    monkeypatch.setattr(admission, "connect", Server(room=3, dies=True).connect)
    with pytest.raises(ConnectionError, match="gone"):
        asyncio.run(admission.count_admitted(provider, [300] * 9))
