"""Requests of other peers as typed records; everything a peer can get wrong is a BadRequest naming the field.

What only the engine can judge (shapes against the model, positions against the session) is left to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hivemind.proto import runtime_pb2

from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import BadRequest, NotServed
from petalsd.swarm.codec import (
    DUMMY,
    DUMMY_INT64,
    arrange,
    decode_metadata,
    decode_tensor,
    is_compressed,
    is_dummy,
    outline,
    unpacked_bytes,
)
from petalsd.swarm.protocol import MAX_TENSORS, parse_span
from petalsd.types import BlockSpan

_MAX_ID = 256
_MAX_NEXT_SERVERS = 256


@dataclass(frozen=True, slots=True)
class NextServer:
    """A hop of the chain after us: where a step's output may be pushed."""

    peer: str
    session_id: str
    span: BlockSpan


class StepMessage(NamedTuple):
    """One message of a session, from its client or pushed; its ``num_bytes`` of tensors are not decoded yet.

    ``kept_bytes``: what its session's stream counts of it.
    """

    tensors: Sequence[runtime_pb2.Tensor]
    metadata: Mapping[str, Any]
    uid: str
    step_id: str | None
    start: int | None
    next_servers: tuple[NextServer, ...]
    is_pushed: bool = False
    num_bytes: int = 0
    kept_bytes: int = 0

    @classmethod
    def parse(
        cls, request: runtime_pb2.ExpertRequest, is_pushed: bool = False, kept_bytes: int = 0
    ) -> StepMessage:
        if len(request.tensors) > MAX_TENSORS:
            raise BadRequest("tensors", f"{len(request.tensors)} of them", f"at most {MAX_TENSORS} in a step")
        metadata = decode_metadata(request.metadata)
        return cls(
            tensors=request.tensors,
            metadata=metadata,
            uid=request.uid,
            step_id=_text(metadata, "step_id"),
            start=_start(metadata),
            next_servers=_next_servers(metadata),
            is_pushed=is_pushed,
            num_bytes=request.ByteSize(),
            kept_bytes=kept_bytes,
        )


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What the first message of a session asks for. ``structure`` places the tensors of all its messages.

    ticket      that of a session which another server handed to us
    can_follow  whether the client understands that its session was handed to another server
    """

    spec: SessionSpec
    session_id: str | None
    structure: object
    ticket: str | None
    can_follow: bool

    @classmethod
    def parse(cls, first: StepMessage, prefix: str, peer: str, max_alloc_timeout_s: float) -> OpenRequest:
        metadata = first.metadata
        check_common(metadata)
        structure = metadata.get("args_structure")
        hidden = arrange(first.tensors, structure, 3)[0]
        if len(hidden.size) != 3 or hidden.size[0] < 1:
            raise BadRequest("tensors[0].size", hidden.size[:16], "must be [batch, tokens, hidden size]")
        spec = SessionSpec(
            span=served_span(first.uid, prefix),
            batch=hidden.size[0],
            max_tokens=_max_length(metadata),
            peer=peer,
            alloc_timeout_s=min(_alloc_timeout(metadata), max_alloc_timeout_s),
            adapter=adapter_of(metadata),
        )
        session_id, ticket = _text(metadata, "session_id"), _text(metadata, "session_ticket")
        return cls(spec, session_id, structure, ticket, metadata.get("can_follow") is True)


@dataclass(frozen=True, slots=True)
class PushRequest:
    """A step that another server hands to one of our sessions."""

    span: BlockSpan
    session_id: str
    message: StepMessage

    @classmethod
    def parse(cls, request: runtime_pb2.ExpertRequest, prefix: str) -> PushRequest:
        num_bytes = max(request.ByteSize(), unpacked_bytes(request.tensors))
        message = StepMessage.parse(request, is_pushed=True, kept_bytes=num_bytes)
        session_id = _text(message.metadata, "session_id")
        if session_id is None:
            raise BadRequest("session_id", None, "a push must name its session")
        return cls(served_span(request.uid, prefix), session_id, message)


def decode_step(tensors: Sequence[runtime_pb2.Tensor], start: int, check: Callable[[Step], None]) -> Step:
    """The tensors of a step, in order: hidden, prompts, hypo_ids.

    ``check`` sees the shapes of compressed ones before any is unpacked, and raises.
    """
    hidden, prompts, hypo_ids = tensors
    if is_compressed(hidden) or is_compressed(prompts):
        check(Step(outline(hidden, "hidden states"), start, _prompts_outline(prompts)))
    states = decode_tensor(hidden, "hidden states")
    return Step(
        hidden=states,
        start=start,
        prompts=_prompts(prompts),
        hypo_ids=_hypo_ids(hypo_ids, states.shape[0] if states.dim() else 0),
    )


def decode_forward(
    tensors: Sequence[runtime_pb2.Tensor],
    metadata: Mapping[str, Any],
    span: BlockSpan,
    peer: str,
    check: Callable[[PassRequest], None],
) -> PassRequest:
    """The tensors of a forward pass: hidden, prompts; ``check`` as for ``decode_step``."""
    check_common(metadata)
    _output_compression(metadata, (1,))
    hidden, prompts = arrange(tensors, metadata.get("args_structure"), 2)
    if is_compressed(hidden) or is_compressed(prompts):
        check(PassRequest(span, outline(hidden, "hidden states"), peer, _prompts_outline(prompts)))
    return PassRequest(
        span=span,
        hidden=decode_tensor(hidden, "hidden states"),
        peer=peer,
        prompts=_prompts(prompts),
        adapter=adapter_of(metadata),
    )


def decode_backward(
    tensors: Sequence[runtime_pb2.Tensor],
    metadata: Mapping[str, Any],
    span: BlockSpan,
    peer: str,
    check: Callable[[PassRequest], None],
) -> PassRequest:
    """The tensors of a backward pass: inputs, output gradients, prompts; ``check`` as for ``decode_step``."""
    check_common(metadata)
    _output_compression(metadata, (1, 2))
    hidden, grad_output, prompts = arrange(tensors, metadata.get("args_structure"), 3)
    if is_compressed(hidden) or is_compressed(prompts):
        check(PassRequest(span, outline(hidden, "hidden states"), peer, _prompts_outline(prompts)))
    states = decode_tensor(hidden, "hidden states")
    if is_compressed(grad_output):
        check(PassRequest(span, states, peer, grad_output=outline(grad_output, "grad_outputs")))
    return PassRequest(
        span=span,
        hidden=states,
        peer=peer,
        prompts=_prompts(prompts),
        grad_output=decode_tensor(grad_output, "grad_outputs"),
        adapter=adapter_of(metadata),
    )


def served_span(uid: str, prefix: str) -> BlockSpan:
    """The blocks that a uid names; NotServed when they belong to another model."""
    model, span = parse_span(uid)
    if model != prefix:
        raise NotServed(f"model {model[:120]!r} is not served here, {prefix!r} is")
    return span


def check_common(metadata: Mapping[str, Any]) -> None:
    """What every computing call may carry, and does not matter: the price offered."""
    points = metadata.get("points", 0)
    if not _is_number(points):
        raise BadRequest("points", points, "must be a number")


def adapter_of(metadata: Mapping[str, Any]) -> str | None:
    """The adapter that is wanted, if one is; whether it is here, the engine knows."""
    adapter = metadata.get("active_adapter")
    if not adapter:
        return None
    if not isinstance(adapter, str):
        raise BadRequest("active_adapter", adapter, "must be the name of an adapter")
    return adapter


def _prompts(proto: runtime_pb2.Tensor) -> torch.Tensor | None:
    tensor = decode_tensor(proto, "prompts")
    return None if tensor is DUMMY or is_dummy(tensor) else tensor


def _prompts_outline(proto: runtime_pb2.Tensor) -> torch.Tensor | None:
    tensor = outline(proto, "prompts")
    return None if is_dummy(tensor) else tensor


def _hypo_ids(proto: runtime_pb2.Tensor, batch: int) -> tuple[int, ...] | None:
    if proto.dtype != "int64":  # floats might be compressed
        raise BadRequest("hypo_ids", proto.dtype, "must be int64, also when empty")
    tensor = decode_tensor(proto, "hypo_ids")
    if tensor is DUMMY_INT64 or is_dummy(tensor):
        return None
    if tensor.dim() != 1 or len(tensor) != batch:
        raise BadRequest("hypo_ids", list(tensor.shape), f"must hold {batch} row numbers, one per row")
    return tuple(tensor.tolist())


def _max_length(metadata: Mapping[str, Any]) -> int:
    value: Any = metadata.get("max_length")
    if not _is_int(value) or value < 0:
        raise BadRequest("max_length", value, "the first message must carry an int >= 0")
    return int(value)


def _alloc_timeout(metadata: Mapping[str, Any]) -> float:
    value = metadata.get("alloc_timeout", 0.0)
    if not _is_number(value) or not math.isfinite(value) or value < 0:
        raise BadRequest("alloc_timeout", value, "must be seconds >= 0")
    return float(value)


def _start(metadata: Mapping[str, Any]) -> int | None:
    if "start_from_position" not in metadata:
        return None
    value = metadata["start_from_position"]
    if not _is_int(value) or value < 0:
        raise BadRequest("start_from_position", value, "must be an int >= 0")
    return int(value)


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_ID:
        raise BadRequest(key, value, f"must be text of 1 to {_MAX_ID} characters")
    return value


def _next_servers(metadata: Mapping[str, Any]) -> tuple[NextServer, ...]:
    value = metadata.get("next_servers") or ()
    if not isinstance(value, tuple | list) or len(value) > _MAX_NEXT_SERVERS:
        raise BadRequest("next_servers", value, f"must be a list of at most {_MAX_NEXT_SERVERS} servers")
    return tuple(_next_server(item) for item in value)


def _next_server(item: object) -> NextServer:
    rule = "must be (PeerID, session id, first block, block after the last)"
    if not isinstance(item, tuple | list) or len(item) != 4:
        raise BadRequest("next_servers", item, rule)
    peer, session_id, start, end = item
    names_fit = all(isinstance(name, str) and 0 < len(name) <= _MAX_ID for name in (peer, session_id))
    if not names_fit or not (_is_int(start) and _is_int(end) and 0 <= start < end):
        raise BadRequest("next_servers", item, rule)
    return NextServer(peer, session_id, BlockSpan(start, end))


def _output_compression(metadata: Mapping[str, Any], lengths: tuple[int, ...]) -> None:
    value = metadata.get("output_compression")
    if value is None:
        return
    if not isinstance(value, tuple | list) or len(value) not in lengths:
        raise BadRequest(
            "output_compression", value, f"must be a list of {' or '.join(map(str, lengths))} codecs"
        )
    if any(codec != runtime_pb2.NONE for codec in value):
        raise BadRequest("output_compression", value, "this server answers uncompressed: 0")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
