"""A session's way from one server of petalsd to another: what is said on the wire (protocol.md 11).

    giver  ──> taker   the offer: whose session, which blocks, how long
    giver  <── taker   accepted: pages are reserved
    giver  ──> taker   keys and values, chunk after chunk, while the session goes on
    giver  ──> taker   those that came or changed meanwhile, now that the session stands still
    giver  ──> taker   its position, and the digest of all of it
    giver  <── taker   a ticket, with which the session's client, and nobody else, continues there

Stock servers and clients do not know the call; the taker can refuse at any point with a typed error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import Chunks, KeysValues, Place
from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest
from petalsd.swarm.codec import DTYPES, decode_metadata, decode_tensor, encode_metadata, encode_tensor
from petalsd.swarm.protocol import make_chain
from petalsd.swarm.requests import adapter_of, served_span
from petalsd.types import BlockSpan

_VERSION = 3
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"version", "client", "batch", "max_tokens", "dtype", "num_kv_heads", "head_dim", "active_adapter"}
_PLACE_FIELDS = ("start_block", "end_block", "start", "end")


@dataclass(frozen=True, slots=True)
class KVShape:
    """Of a token's keys in one block and row; its values are the same."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, session: Session, dtype: torch.dtype) -> KVShape:
        return cls(session.kv_geometry.num_kv_heads, session.kv_geometry.head_dim, dtype)

    @property
    def token_bytes(self) -> int:
        return self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Offer:
    """``spec`` as the client opened it, with that client as its peer."""

    spec: SessionSpec
    shape: KVShape

    def to_wire(self, prefix: str) -> runtime_pb2.ExpertRequest:
        spec, shape = self.spec, self.shape
        metadata = {
            "version": _VERSION,
            "client": spec.peer,
            "batch": spec.batch,
            "max_tokens": spec.max_tokens,
            "dtype": _DTYPE_NAMES[shape.dtype],
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "active_adapter": spec.adapter or "",
        }
        uid = make_chain(prefix, spec.span)
        return runtime_pb2.ExpertRequest(uid=uid, metadata=encode_metadata(metadata))

    @classmethod
    def parse(cls, request: runtime_pb2.ExpertRequest, prefix: str) -> Offer:
        """BadRequest for what is malformed, NotServed for another model; the rest is the engine's to judge."""
        metadata = decode_metadata(request.metadata)
        if metadata.get("version") != _VERSION:
            raise BadRequest(
                "version", metadata.get("version"), f"hand-overs of version {_VERSION} are taken"
            )
        if missing := _FIELDS - metadata.keys():
            raise BadRequest("metadata", sorted(metadata), f"an offer needs {', '.join(sorted(missing))} too")
        dtype = metadata["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise BadRequest("dtype", dtype, f"must be one of {', '.join(DTYPES)}")
        client = metadata["client"]
        if not isinstance(client, str) or not 32 <= len(client) <= 64 or not client.isalnum():
            raise BadRequest("client", client, "must be a base58 PeerID")
        batch, max_tokens, heads, head_dim = (
            _count(metadata, name) for name in ("batch", "max_tokens", "num_kv_heads", "head_dim")
        )
        span, adapter = served_span(request.uid, prefix), adapter_of(metadata)
        spec = SessionSpec(span, batch, max_tokens, client, adapter=adapter)
        return cls(spec, KVShape(heads, head_dim, DTYPES[dtype]))

    @property
    def chunks(self) -> Chunks:
        return Chunks(self.spec, self.shape.token_bytes)

    def check(self, place: Place) -> None:
        """BadRequest unless such a chunk is the session's, and of a size that others may have to wait for."""
        if not self.spec.span.covers(place.blocks):
            raise BadRequest("start_block, end_block", str(place.blocks), f"must be of {self.spec.span}")
        if not place.start < place.end <= self.spec.max_tokens:
            raise BadRequest("start, end", (place.start, place.end), f"must be within {self.spec.max_tokens}")
        at_once = self.chunks.tokens_at_once
        if (place.end - place.start) * len(place.blocks) > at_once:
            raise BadRequest(
                "start, end", (place.start, place.end), f"{at_once} tokens of a block may come at once"
            )


class Seal:
    """What both sides compute over all that is sent, in order."""

    def __init__(self, offer: runtime_pb2.ExpertRequest) -> None:
        self._hash = hashlib.blake2b(offer.uid.encode() + offer.metadata, digest_size=32)

    def add(self, message: runtime_pb2.ExpertRequest) -> None:
        self._hash.update(message.metadata)
        for tensor in message.tensors:
            self._hash.update(tensor.buffer)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class Intake:
    """What has come of an offered session: of each block the tokens from the first one on, without a gap."""

    def __init__(self, offer: Offer, opening: runtime_pb2.ExpertRequest) -> None:
        self._offer = offer
        self._seal = Seal(opening)
        self._lengths = dict.fromkeys(offer.spec.span, 0)

    def accept(self, message: runtime_pb2.ExpertRequest) -> tuple[Place, KeysValues]:
        """A chunk and where it belongs; BadRequest for one that does not fit there or would leave a gap."""
        place = _unpack_place(message.metadata)
        self._offer.check(place)
        length = min(self._lengths[block] for block in place.blocks)
        if place.start > length:
            raise BadRequest("start", place.start, f"blocks {place.blocks} have {length} tokens so far")
        chunk = _unpack_tensors(message, self._offer, place)
        self._seal.add(message)
        self._lengths |= dict.fromkeys(place.blocks, place.end)
        return place, chunk

    def end(self, message: runtime_pb2.ExpertRequest) -> int:
        """The position; BadRequest unless all that belongs to it came, and as it was sent."""
        position, length = _count(decode_metadata(message.metadata), "position"), min(self._lengths.values())
        if position > length:
            raise BadRequest("position", position, f"{length} tokens came")
        digest = unpack_text(message.metadata, "digest")
        if digest != self._seal.digest:
            raise BadRequest("digest", digest, "not that of what arrived")
        return position


def pack_chunk(place: Place, chunk: KeysValues) -> runtime_pb2.ExpertRequest:
    values = (place.blocks.start, place.blocks.end, place.start, place.end)
    metadata = encode_metadata(dict(zip(_PLACE_FIELDS, values, strict=True)))
    return runtime_pb2.ExpertRequest(tensors=[encode_tensor(part) for part in chunk], metadata=metadata)


def pack_end(position: int, digest: str) -> runtime_pb2.ExpertRequest:
    return runtime_pb2.ExpertRequest(metadata=encode_metadata({"position": position, "digest": digest}))


def _unpack_place(metadata: bytes) -> Place:
    fields = decode_metadata(metadata)
    first, last, start, end = (_count(fields, name) for name in _PLACE_FIELDS)
    if first >= last:
        raise BadRequest("start_block, end_block", (first, last), "must be at least one block")
    return Place(BlockSpan(first, last), start, end)


def _unpack_tensors(message: runtime_pb2.ExpertRequest, offer: Offer, place: Place) -> KeysValues:
    """BadRequest unless the chunk has exactly the shape and dtype that belong to ``place``; it is finite then."""
    shape, tokens = offer.shape, place.end - place.start
    expected = [len(place.blocks), offer.spec.batch, tokens, shape.num_kv_heads, shape.head_dim]
    sizes = [tensor.size[:8] for tensor in message.tensors[:4]]
    if sizes != [expected, expected]:
        raise BadRequest("tensors", sizes, f"blocks {place.blocks} need keys and values of {expected}")
    keys, values = (decode_tensor(part, "keys and values") for part in message.tensors)
    if keys.dtype != shape.dtype or values.dtype != shape.dtype:
        raise BadRequest("dtype", f"{keys.dtype}, {values.dtype}", f"must be {shape.dtype}")
    return keys, values


def pack_text(key: str, value: str) -> bytes:
    return encode_metadata({key: value})


def unpack_text(metadata: bytes, key: str) -> str:
    """BadRequest when the message brings no such text."""
    value = decode_metadata(metadata).get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise BadRequest(key, value, "must be a text")
    return value


def _count(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise BadRequest(name, value, "must be an int >= 0")
    return value
