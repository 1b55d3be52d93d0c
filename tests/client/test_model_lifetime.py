"""What ends when: sessions, models and what they hold, also when nobody closes them."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from petalsd.client.model import RemoteCausalLM
from petalsd.errors import BadRequest, SessionClosed
from tests.client.fake_model import PROMPT
from tests.client.fake_swarm import FakeSwarm

LONG = PROMPT.repeat(1, 4)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


async def nothing() -> None:
    """Comes behind whatever the loop was asked for before."""


def test_a_session_that_is_dropped_ends(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    """Servers would hold memory for it for minutes."""
    cache = model.inference_session(max_tokens=40)
    model.generate(PROMPT, past_key_values=cache, **GREEDY)
    assert swarm.open_streams == 2
    del cache
    gc.collect()
    model.runtime.run(nothing())
    assert swarm.open_streams == 0


def test_a_closed_session_does_not_open(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    """Used or not, for nobody would close it again; the error says what to do."""
    unused, used = model.inference_session(max_tokens=40), model.inference_session()
    model.generate(PROMPT, past_key_values=used, **GREEDY)
    for cache in (unused, used):
        cache.close()
        with pytest.raises(SessionClosed, match=r"model\.inference_session\(\) makes another"):
            model.generate(torch.cat([PROMPT, PROMPT], dim=1), past_key_values=cache, **GREEDY)
        with pytest.raises(SessionClosed):
            model(PROMPT, past_key_values=cache)
    assert swarm.open_streams == 0


def leave(swarm: FakeSwarm) -> None:
    """Streams end with their client's libp2p daemon, which is none here."""
    for server in swarm.servers.values():
        server.open_streams = 0


def test_a_session_outlives_its_client_without_a_word(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    """Its end must not hide why the block around it is left."""
    with pytest.raises(ValueError, match="mine"), model.inference_session() as cache:
        model.generate(PROMPT, past_key_values=cache, **GREEDY)
        model.close()
        raise ValueError("mine")
    leave(swarm)


def test_closing_ends_a_generation(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    """It is told why."""
    begun, errors = threading.Event(), []
    swarm.servers["b"].hangs_at = 2

    class Starter(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            begun.set()

        def end(self) -> None: ...

    def generate() -> None:
        try:
            model.generate(PROMPT, streamer=Starter(), **GREEDY)
        except SessionClosed as error:
            errors.append(error.message)

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait(10)
    model.close()
    thread.join(10)
    assert errors in (["the client was closed meanwhile"], ["the client is not running"])
    leave(swarm)


def test_one_thread_at_a_time_generates_with_a_session(model: RemoteCausalLM) -> None:
    """Each would continue the other's text."""
    errors = []

    class Meddler(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            thread = threading.Thread(target=meddle)
            thread.start()
            thread.join(10)

        def end(self) -> None: ...

    def meddle() -> None:
        try:
            model.generate(LONG, past_key_values=cache, **GREEDY)
        except BadRequest as error:
            errors.append(error.message)

    with model.inference_session(max_tokens=40) as cache:
        output = model.generate(PROMPT, past_key_values=cache, streamer=Meddler(), **GREEDY)
        assert output.tolist() == model.generate(PROMPT, **GREEDY).tolist()
        assert model.generate(LONG, past_key_values=cache, **GREEDY).shape == (1, 24)
    assert len(errors) == 5 and all("another thread is generating with it" in error for error in errors)


def test_a_length_counts_once_the_session_is_open(model: RemoteCausalLM) -> None:
    """A generation that failed before leaves the next one its own."""
    with model.inference_session() as cache:
        with pytest.raises(BadRequest, match="padding"):
            model.generate(PROMPT, attention_mask=PROMPT - 1, past_key_values=cache, **GREEDY)
        assert model.generate(PROMPT, past_key_values=cache, max_new_tokens=9).shape == (1, 14)
