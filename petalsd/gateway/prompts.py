"""From a request to what is generated from: tokens, and settings with the model's own defaults."""

from __future__ import annotations

import threading
from http import HTTPStatus
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from petalsd.client.tokenizer import encode_chat, encode_text
from petalsd.errors import BadRequest, WeightsError
from petalsd.gateway.generation import Prompt
from petalsd.gateway.refusal import CONTEXT_LENGTH_EXCEEDED, Refusal
from petalsd.gateway.requests import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
)
from petalsd.gateway.sampling import Sampling

_MAX_CONTEXT = 1 << 17  # of models that name no limit


def default_sampling(settings: GenerationConfig) -> Sampling:
    """What a model's own settings say of drawing, where they say that tokens are drawn; else OpenAI's defaults."""
    if not settings.do_sample:
        return Sampling()
    chosen = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    return Sampling(**{name: value for name, value in chosen.items() if value is not None})


class Prompts:
    """``config``, the model's, bounds token ids and lengths; ``default`` is for what a request leaves out."""

    def __init__(self, tokenizer: Any, config: PreTrainedConfig, default: Sampling) -> None:
        self._tokenizer = tokenizer
        self._vocab_size: int = config.vocab_size
        # Servers have limits of their own, but before they are asked a prompt's embeddings are held here.
        self._max_context: int = getattr(config, "max_position_embeddings", None) or _MAX_CONTEXT
        self._default = default
        # The first call of a tokenizer changes it, which must not happen beside another one.
        self._lock = threading.Lock()

    def of_text(self, request: CompletionRequest) -> Prompt:
        """BadRequest for tokens that the model has not, or none; Refusal for more than it takes."""
        prompt = request.prompt
        if isinstance(prompt, str):
            with self._lock:
                input_ids = encode_text(self._tokenizer, prompt)
            return self._prompt(request, input_ids, "prompt")
        unknown = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if unknown is not None:
            raise BadRequest("prompt", unknown, f"token ids are 0 to {self._vocab_size - 1}")
        return self._prompt(request, torch.tensor([prompt], dtype=torch.int64), "prompt")

    def of_chat(self, request: ChatRequest) -> Prompt:
        """BadRequest for messages that the model's chat template refuses, as for want of one."""
        messages = [message.plain for message in request.messages]
        try:
            with self._lock:
                input_ids = encode_chat(self._tokenizer, messages)
        except WeightsError as error:
            rule = f"{error.message}; /v1/completions needs none"
            raise BadRequest("messages", [message["role"] for message in messages], rule) from error
        return self._prompt(request, input_ids, "messages")

    def _prompt(self, request: GenerationRequest, input_ids: torch.Tensor, field: str) -> Prompt:
        if input_ids.shape[1] == 0:
            raise BadRequest(field, "", "there is no token in it")
        room = self._max_context - input_ids.shape[1]
        limit = request.token_limit or min(DEFAULT_MAX_TOKENS, max(room, 1))
        if limit > room:
            text = f"{input_ids.shape[1]} tokens of {field} and {limit} more: the model takes {self._max_context}"
            raise Refusal(HTTPStatus.BAD_REQUEST, CONTEXT_LENGTH_EXCEEDED, text, "max_tokens")
        sampling = request.sampling(self._default)
        return Prompt(input_ids, limit, request.stops, sampling)
