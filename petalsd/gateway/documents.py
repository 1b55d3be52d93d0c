"""Answers in OpenAI's form: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

from petalsd.gateway.generation import FinishReason, Generation

Document = dict[str, Any]


def usage(generation: Generation) -> Document:
    num_prompt_tokens, num_tokens = generation.num_prompt_tokens, generation.num_tokens
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def error(message: str, code: str, kind: str, field: str | None = None) -> Document:
    """``kind`` is what OpenAI calls type; ``field`` is that of the request."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


class Completion:
    """Of a text that is continued. ``model`` is the name that it goes by."""

    prefix: str = "cmpl"
    whole_kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, generation: Generation) -> Document:
        choice = self._choice(generation.finish_reason, **self._content(text))
        return {**self._head, "object": self.whole_kind, "choices": [choice], "usage": usage(generation)}

    def opening(self) -> list[Document]:
        """Chunks before the first text."""
        return []

    def chunk(self, text: str) -> Document:
        return self._chunk(self._choice(None, text=text))

    def closing(self, reason: FinishReason) -> Document:
        """The chunk after the last text."""
        return self._chunk(self._choice(reason, text=""))

    def usage_chunk(self, generation: Generation) -> Document:
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage(generation)}

    def _content(self, text: str) -> Document:
        """Of a whole answer."""
        return {"text": text}

    def _chunk(self, choice: Document) -> Document:
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def _choice(self, reason: FinishReason | None, **content: object) -> Document:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


class Chat(Completion):
    """Of a message in a conversation."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self) -> list[Document]:
        return [self._chunk(self._choice(None, delta={"role": "assistant", "content": ""}))]

    def chunk(self, text: str) -> Document:
        return self._chunk(self._choice(None, delta={"content": text}))

    def closing(self, reason: FinishReason) -> Document:
        return self._chunk(self._choice(reason, delta={}))

    def _content(self, text: str) -> Document:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}
