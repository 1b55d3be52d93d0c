"""A session's way from one server of petalsd to another: what is said on the wire (protocol.md 11).

    giver  ──> taker   the offer: whose session, which blocks, how long
    giver  <── taker   accepted: pages are reserved
    giver  ──> taker   keys and values, chunk after chunk, block after block
    giver  ──> taker   the digest of all of it
    giver  <── taker   a ticket, with which the session's client, and nobody else, continues there

Stock servers and clients do not know the call; the taker can refuse at any point with a typed error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from petalsd.engine.handle import Session
from petalsd.engine.kv_transfer import KeysValues, Place
from petalsd.engine.step import SessionSpec
from petalsd.errors import BadRequest
from petalsd.swarm.codec import DTYPES, decode_metadata, decode_tensor, encode_metadata, encode_tensor
from petalsd.swarm.protocol import MIB, make_chain
from petalsd.swarm.requests import served_span

_VERSION = 1
_CHUNK_BYTES = MIB  # of keys, and of values: small beside what a session's step may bring
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"version", "client", "batch", "max_tokens", "position", "dtype", "num_kv_heads", "head_dim"}


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
    """``spec`` as the client opened it, with that client as its peer; each row holds ``position`` tokens."""

    spec: SessionSpec
    position: int
    shape: KVShape

    def to_wire(self, prefix: str) -> runtime_pb2.ExpertRequest:
        spec, shape = self.spec, self.shape
        metadata = {
            "version": _VERSION,
            "client": spec.peer,
            "batch": spec.batch,
            "max_tokens": spec.max_tokens,
            "position": self.position,
            "dtype": _DTYPE_NAMES[shape.dtype],
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
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
        batch, max_tokens, position, heads, head_dim = (
            _count(metadata, name) for name in ("batch", "max_tokens", "position", "num_kv_heads", "head_dim")
        )
        if position > max_tokens:
            raise BadRequest("position", position, f"must be at most max_tokens, {max_tokens}")
        spec = SessionSpec(served_span(request.uid, prefix), batch, max_tokens, client)
        return cls(spec, position, KVShape(heads, head_dim, DTYPES[dtype]))

    def places(self) -> Iterator[Place]:
        """The chunks, in the order in which they go."""
        tokens = max(1, _CHUNK_BYTES // (self.spec.batch * self.shape.token_bytes))
        for block in self.spec.span:
            for start in range(0, self.position, tokens):
                yield Place(block, start, min(self.position, start + tokens))


class Seal:
    """What both sides compute over all that is sent, in order."""

    def __init__(self, offer: runtime_pb2.ExpertRequest) -> None:
        self._hash = hashlib.blake2b(offer.uid.encode() + offer.metadata, digest_size=32)

    def add(self, message: runtime_pb2.ExpertRequest) -> None:
        for tensor in message.tensors:
            self._hash.update(tensor.buffer)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def pack_chunk(chunk: KeysValues) -> runtime_pb2.ExpertRequest:
    return runtime_pb2.ExpertRequest(tensors=[encode_tensor(part) for part in chunk])


def unpack_chunk(message: runtime_pb2.ExpertRequest, offer: Offer, place: Place) -> KeysValues:
    """BadRequest unless the chunk has exactly the shape and dtype that belong to ``place``; it is finite then."""
    shape = offer.shape
    expected = [offer.spec.batch, place.end - place.start, shape.num_kv_heads, shape.head_dim]
    if [list(tensor.size) for tensor in message.tensors] != [expected, expected]:
        sizes = [list(tensor.size)[:8] for tensor in message.tensors[:4]]
        raise BadRequest("tensors", sizes, f"block {place.block} needs keys and values of {expected}")
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
    value = metadata[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise BadRequest(name, value, "must be an int >= 0")
    return value
