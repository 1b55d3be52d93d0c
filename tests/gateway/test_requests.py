"""What a request may say, and how the rest is refused."""

from __future__ import annotations

import json

import pytest

from petalsd.errors import BadRequest
from petalsd.gateway.requests import ChatRequest, CompletionRequest, parse_generation
from petalsd.gateway.sampling import Sampling

MESSAGES = [{"role": "user", "content": "hello"}]


def completion(**fields: object) -> CompletionRequest:
    return parse_generation(CompletionRequest, json.dumps({"prompt": "hello", **fields}).encode())


def chat(**fields: object) -> ChatRequest:
    return parse_generation(ChatRequest, json.dumps({"messages": MESSAGES, **fields}).encode())


def test_what_a_request_leaves_out_is_the_models() -> None:
    default = Sampling(temperature=0.6, top_p=0.9, top_k=20)
    assert completion().sampling(default) == default
    assert completion().token_limit is chat().token_limit is None
    assert completion().stops == []
    assert not completion().has_usage_at_end
    chosen = completion(temperature=0, top_p=0.5, top_k=-1, seed=7, presence_penalty=1, frequency_penalty=0.5)
    assert chosen.sampling(default) == Sampling(0, 0.5, 0, 1, 0.5, 7)


def test_what_front_ends_send_for_nothing_is_passed_over() -> None:
    """Fields that ask for what is done anyhow, and such as nobody knows."""
    idle = {"n": 1, "logprobs": None, "tools": [], "response_format": {"type": "text"}, "echo": False}
    asked = completion(user="me", store=True, mirostat=2, stream_options=None, **idle)
    assert asked.prompt == "hello"


@pytest.mark.parametrize(
    ("prompt", "expected"), [(["hi"], "hi"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ("", "")]
)
def test_forms_of_a_prompt(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompt == expected


def test_forms_of_messages() -> None:
    """Parts of text are joined; a developer is the system."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]
    asked = chat(
        messages=[
            {"role": "developer", "content": "be brief", "name": "me"},
            {"role": "user", "content": parts},
        ]
    )
    assert [message.plain for message in asked.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
    ]
    assert chat(max_tokens=3).token_limit == 3
    assert chat(max_tokens=3, max_completion_tokens=5).token_limit == 5


@pytest.mark.parametrize(
    ("stop", "expected"), [("END", ["END"]), (["a", "b"], ["a", "b"]), ([], []), (None, [])]
)
def test_forms_of_stop_strings(stop: object, expected: list[str]) -> None:
    assert completion(stop=stop).stops == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "10"),
        ("max_tokens", True),
        ("max_tokens", 1 << 40),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("presence_penalty", 3),
        ("seed", 1 << 64),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stream", "yes"),
        ("stream_options", []),
        ("prompt", 5),
        ("prompt", ["one", "two"]),
        ("prompt", [[1], [2]]),
        ("prompt", [1.5]),
        ("n", 2),
        ("best_of", 3),
        ("echo", True),
        ("logprobs", 1),
        ("logprobs", 0),
        ("logit_bias", {"5": 1}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(BadRequest, match=f"^bad_request: {field} = ") as refused:
        completion(**{field: value})
    assert refused.value.field == field


@pytest.mark.parametrize(
    "messages",
    [[], "hello", [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "user", "content": None}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]],
)  # fmt: skip
def test_wrong_messages(messages: object) -> None:
    with pytest.raises(BadRequest, match=r"^bad_request: messages = "):
        chat(messages=messages)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"prompt": NaN}'])
def test_bodies_that_are_none(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_generation(CompletionRequest, body)
