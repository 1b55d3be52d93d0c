"""What a request may say: the fields of OpenAI's interface, checked. What is not done here is refused by name,
instead of answered as if it had not been asked for; fields that nobody knows are passed over, for front ends send
many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from petalsd.control.connection import parse_json_object
from petalsd.control.routes import parse_request
from petalsd.errors import BadRequest
from petalsd.gateway.sampling import Sampling

DEFAULT_MAX_TOKENS = 512
_MAX_TOKENS = 1 << 20  # far above any session
_MAX_STOPS = 16
_MAX_STOP_CHARS = 256

# Fields that would change the answer, and the values that ask for nothing.
_NOT_DONE: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}

_R = TypeVar("_R", bound="GenerationRequest")
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=1, le=_MAX_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]


def _without_list(value: object) -> object:
    """A list of one prompt is that prompt."""
    is_list = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list)
    return value[0] if isinstance(value, list) and is_list else value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What completions and chats have in common. ``top_k`` is no field of OpenAI's, but of most front ends."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_TOKENS)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_usage_at_end(self) -> bool:
        """Of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """None: no more than ``DEFAULT_MAX_TOKENS``, and what the model has room for."""
        return self.max_tokens

    def sampling(self, default: Sampling) -> Sampling:
        """``default`` says what the request does not."""

        def chosen(name: str) -> Any:
            value = getattr(self, name)
            return getattr(default, name) if value is None else value

        return Sampling(
            temperature=chosen("temperature"),
            top_p=chosen("top_p"),
            top_k=max(chosen("top_k"), 0),
            presence_penalty=chosen("presence_penalty"),
            frequency_penalty=chosen("frequency_penalty"),
            seed=self.seed,
        )


class CompletionRequest(GenerationRequest):
    """``prompt``: a text, or the tokens of one."""

    prompt: Annotated[str | list[int], BeforeValidator(_without_list)]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """``developer`` is what newer clients call ``system``."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse_generation(kind: type[_R], body: bytes) -> _R:
    """The body as ``kind``; BadRequest names the field, its value and the rule."""
    request = parse_request(kind, body)
    _refuse_what_is_not_done(parse_json_object(body))
    return request


def _refuse_what_is_not_done(fields: Mapping[str, Any]) -> None:
    for name, harmless in _NOT_DONE.items():
        value = fields.get(name)
        if not any(type(value) is type(other) and value == other for other in harmless):
            raise BadRequest(name, value, "this is not supported here: leave it out")
