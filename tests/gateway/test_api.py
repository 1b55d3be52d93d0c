"""The interface over a real server: answers as transformers computes them, in OpenAI's form."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import aiohttp
import pytest
import torch

from petalsd.errors import MissingBlocks, RemoteFailure
from petalsd.gateway.keys import Keys
from petalsd.gateway.refusal import Refusal
from tests.gateway.conftest import NAME, Serve, Tiny
from tests.waiting import eventually

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(120)]

PROMPT = "w7 w99 w3"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


class Slow:
    """A model whose generation goes on until the test lets it."""

    def __init__(self, tiny: Tiny) -> None:
        self.config, self.client = tiny.remote.config, tiny.remote.client
        self.generation_config = tiny.remote.generation_config
        self.go_on = threading.Event()
        self.is_stopped = threading.Event()

    def generate(self, input_ids: torch.Tensor, *, stopping_criteria: Any, **_: Any) -> torch.Tensor:
        output = torch.cat([input_ids, torch.tensor([[5]])], dim=1)
        while not self.go_on.wait(0.01):
            if bool(stopping_criteria(output, None).all()):
                self.is_stopped.set()
                break
        return output


class Broken(Slow):
    """One that fails after its first word, or before."""

    def __init__(self, tiny: Tiny, error: Exception, *, has_begun: bool) -> None:
        super().__init__(tiny)
        self.error, self.has_begun = error, has_begun

    def generate(self, input_ids: torch.Tensor, *, stopping_criteria: Any, **_: Any) -> torch.Tensor:
        if self.has_begun:
            stopping_criteria(torch.cat([input_ids, torch.tensor([[5]])], dim=1), None)
        raise self.error


async def test_a_completion(serve: Serve, tiny: Tiny) -> None:
    async with serve() as asking:
        status, answer = await asking.post(
            COMPLETIONS, model=NAME, prompt=PROMPT, max_tokens=8, temperature=0
        )
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["text"].split() == tiny.continued(PROMPT, 8)
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert (answer["object"], answer["model"]) == ("text_completion", NAME)


async def test_a_chat(serve: Serve, tiny: Tiny) -> None:
    """By the template of the model's tokenizer."""
    messages = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]
    async with serve() as asking:
        status, answer = await asking.post(CHATS, messages=messages, max_tokens=4, temperature=0)
    assert status == 200
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"].split() == tiny.continued("w1 w7 w2 w1 w8 w2", 4)
    assert answer["object"] == "chat.completion"


async def test_streams_have_the_same_text(serve: Serve, tiny: Tiny) -> None:
    words = tiny.continued(PROMPT, 8)
    async with serve() as asking:
        *chunks, done = await asking.stream(COMPLETIONS, prompt=PROMPT, max_tokens=8, temperature=0)
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks).split() == words
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 8 + ["length"]
        *chunks, usage, done = await asking.stream(
            CHATS,
            messages=[{"role": "user", "content": "w7"}],
            max_tokens=4,
            temperature=0,
            stream_options={"include_usage": True},
        )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]).split() == tiny.continued("w1 w7 w2", 4)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_stop_string_ends_it(is_stream: bool, serve: Serve, tiny: Tiny) -> None:
    """Before it, and nothing is computed after it."""
    words = tiny.continued(PROMPT, 8)
    place = next(at for at in range(2, 8) if words[at] not in words[:at])
    asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stop": [f" {words[place]}"]}
    async with serve() as asking:
        if is_stream:
            *chunks, _ = await asking.stream(COMPLETIONS, **asked)
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            _, answer = await asking.post(COMPLETIONS, **asked)
            text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
            assert answer["usage"]["completion_tokens"] == place + 1
    assert text.split() == words[:place] and not text.endswith(" ")
    assert reason == "stop"


async def test_an_end_token_ends_it(serve: Serve, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.continued(PROMPT, 8)
    end = tiny.tokenizer.convert_tokens_to_ids(words[3])
    monkeypatch.setattr(tiny.remote.generation_config, "eos_token_id", [end])
    async with serve() as asking:
        _, answer = await asking.post(COMPLETIONS, prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == words.index(words[3]) + 1


async def test_a_seed_repeats_a_draw_beside_others(serve: Serve) -> None:
    """Each answer has a generator of its own, whoever draws meanwhile."""
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 2.0}
    async with serve() as asking:
        alone = (await asking.post(COMPLETIONS, seed=7, **asked))[1]["choices"][0]["text"]
        seeds = [7, 8, 7, None]
        answers = await asyncio.gather(*(asking.post(COMPLETIONS, seed=seed, **asked) for seed in seeds))
    texts = [answer["choices"][0]["text"] for _, answer in answers]
    assert texts[0] == texts[2] == alone
    assert len(set(texts)) == 3


async def test_what_a_request_leaves_out_fits_the_model(serve: Serve, tiny: Tiny) -> None:
    """A long prompt gets the rest of the model's 512 tokens, and one that leaves none is refused."""
    async with serve() as asking:
        _, answer = await asking.post(COMPLETIONS, prompt=[7] * 500, temperature=0)
        assert answer["usage"]["completion_tokens"] == 12
        status, refusal = await asking.post(COMPLETIONS, prompt=[7] * 512)
    assert (status, refusal["error"]["code"]) == (400, "context_length_exceeded")
    assert refusal["error"]["message"] == "512 tokens of prompt and 1 more: the model takes 512"


async def test_tokens_as_a_prompt(serve: Serve, tiny: Tiny) -> None:
    async with serve() as asking:
        _, answer = await asking.post(COMPLETIONS, prompt=[7, 99, 3], max_tokens=4, temperature=0)
        assert answer["choices"][0]["text"].split() == tiny.continued(PROMPT, 4)
        status, refusal = await asking.post(COMPLETIONS, prompt=[7, 256])
    assert status == 400
    assert refusal["error"]["message"] == "prompt = 256: token ids are 0 to 255"


@pytest.mark.parametrize(
    ("path", "fields", "status", "code", "field"),
    [
        (COMPLETIONS, {"prompt": PROMPT, "max_tokens": 0}, 400, "bad_request", "max_tokens"),
        (COMPLETIONS, {"prompt": ""}, 400, "bad_request", "prompt"),
        (COMPLETIONS, {"prompt": PROMPT, "model": "gpt-4"}, 404, "model_not_found", "model"),
        (
            COMPLETIONS,
            {"prompt": PROMPT, "max_tokens": 100_000},
            400,
            "context_length_exceeded",
            "max_tokens",
        ),
        (CHATS, {"messages": []}, 400, "bad_request", "messages"),
        (CHATS, {"messages": [{"role": "system", "content": "w1"}]}, 400, "bad_request", "messages"),
        ("/v1/embeddings", {"input": "x"}, 404, "not_found", None),
    ],
)
async def test_refusals(
    path: str, fields: dict[str, object], status: int, code: str, field: str | None, serve: Serve
) -> None:
    """In OpenAI's form, with the field; nothing is left running."""
    async with serve() as asking:
        found, answer = await asking.post(path, **fields)
        assert (found, answer["error"]["code"], answer["error"]["param"]) == (status, code, field)
        assert answer["error"]["type"] == "invalid_request_error"
        assert (await asking.get("/health"))[1]["running"] == 0


def test_a_server_without_room_for_so_many_tokens() -> None:
    """What is less than the model takes may be more than any server has room for."""
    refusal = Refusal.of(RemoteFailure("peer", "bad_request: max_length = 9000: must be 0 to 8192"))
    assert (refusal.status, refusal.code, refusal.field) == (400, "context_length_exceeded", "max_tokens")
    other = Refusal.of(RemoteFailure("peer", "bad_request: active_adapter = 'x': unknown"))
    assert (other.status, other.code) == (400, "bad_request")
    assert Refusal.of(RemoteFailure("peer", "gone")).status == 503


async def test_other_types_of_content_are_refused(serve: Serve) -> None:
    """A page in a browser may send those anywhere."""
    async with serve() as asking, asking.session.post(COMPLETIONS, data=b'{"prompt": "w1"}') as response:
        assert response.status == 415


async def test_models_and_health(serve: Serve, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve() as asking:
        _, models = await asking.get("/v1/models")
        assert [model["id"] for model in models["data"]] == [NAME]
        assert await asking.get("/health") == (200, {"status": "ok", "running": 0})
        monkeypatch.setattr(tiny.remote.client.manager, "_spans", [])
        status, answer = await asking.get("/health")
    assert status == 503
    assert "no server holds blocks 0:4" in answer["error"]["message"]


async def test_keys(serve: Serve) -> None:
    """Without one nothing is told but whether it works."""
    async with serve(keys=Keys(["a-key-of-mine"])) as asking:
        status, answer = await asking.get("/v1/models")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert (await asking.get("/health"))[0] == 200
        known = {"Authorization": "Bearer a-key-of-mine"}
        assert (await asking.get("/v1/models", headers=known))[0] == 200


async def test_more_answers_than_are_allowed(serve: Serve, tiny: Tiny) -> None:
    """They are told at once to come later; those that are made go on."""
    model = Slow(tiny)
    async with serve(model, max_generations=1) as asking:
        first = asyncio.create_task(asking.post(COMPLETIONS, prompt=PROMPT))
        await eventually(lambda: _running(asking), interval_s=0.01)
        async with asking.session.post(COMPLETIONS, json={"prompt": PROMPT}) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "2")
        model.go_on.set()
        assert (await first)[0] == 200


async def _running(asking: Any) -> bool:
    return bool((await asking.get("/health"))[1]["running"])


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_ends_its_answer(is_stream: bool, serve: Serve, tiny: Tiny) -> None:
    model = Slow(tiny)
    async with serve(model) as asking:
        asked = {"prompt": PROMPT, "stream": is_stream}
        leaving = asyncio.create_task(_read(asking.session, asked))
        await eventually(lambda: _running(asking), interval_s=0.01)
        leaving.cancel()
        assert await asyncio.to_thread(model.is_stopped.wait, 20)
        await eventually(lambda: _is_idle(asking), interval_s=0.01)


async def _is_idle(asking: Any) -> bool:
    return not await _running(asking)


async def _read(session: aiohttp.ClientSession, asked: dict[str, object]) -> None:
    async with session.post(COMPLETIONS, json=asked) as response:
        await response.read()


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (MissingBlocks([2], "tiny"), 503, "no server holds blocks 2:3 of tiny"),
        (RuntimeError("secret"), 500, "the gateway has a bug: see its log"),
    ],
)
async def test_what_fails_is_told_and_no_more(
    error: Exception, status: int, told: str, serve: Serve, tiny: Tiny
) -> None:
    """By the status where nothing has been sent; else by the last event of the stream."""
    async with serve(Broken(tiny, error, has_begun=False)) as asking:
        for is_stream in (False, True):
            found, answer = await asking.post(COMPLETIONS, prompt=PROMPT, stream=is_stream)
            assert found == status
            assert told in answer["error"]["message"] and "secret" not in str(answer)
    async with serve(Broken(tiny, error, has_begun=True)) as asking:
        first, last = await asking.stream(COMPLETIONS, prompt=PROMPT)
        assert first["choices"][0]["text"] == "w5"
        assert told in last["error"]["message"]


async def test_a_stop_completes_what_is_being_made(serve: Serve, tiny: Tiny) -> None:
    """And takes nothing new; what is not complete in time is cut off."""
    model = Slow(tiny)
    async with serve(model) as asking:
        answer = asyncio.create_task(asking.post(COMPLETIONS, prompt=PROMPT))
        await eventually(lambda: _running(asking), interval_s=0.01)
        stopping = asyncio.create_task(asking.gateway.stop(deadline_s=20))
        await asyncio.sleep(0)
        with pytest.raises(aiohttp.ClientConnectionError):
            await asking.get("/health")
        model.go_on.set()
        assert (await answer)[0] == 200
        await stopping
    model = Slow(tiny)
    async with serve(model) as asking:
        answer = asyncio.create_task(asking.post(COMPLETIONS, prompt=PROMPT))
        await eventually(lambda: _running(asking), interval_s=0.01)
        await asking.gateway.stop(deadline_s=0.01)
        assert model.is_stopped.wait(20)
        status, refusal = await answer
    assert (status, refusal["error"]["code"]) == (503, "draining")
