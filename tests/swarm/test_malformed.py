"""Hostile requests: a typed error names the field, others do not notice, no page stays behind."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer

from petalsd.swarm import codec
from petalsd.swarm.codec import decode_tensor
from petalsd.swarm.frames import take_over
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import handle_name
from petalsd.swarm.stream import MessageStream, RemoteError
from petalsd.swarm.stub import _open_stream
from tests.engine.rig import states
from tests.swarm.servers import PREFIX, Server
from tests.swarm.stock import DUMMY, DUMMY_INT64, Request, Response, stock_request

pytestmark = [pytest.mark.swarm, pytest.mark.asyncio(loop_scope="module")]

GIB = 2**30
UID = " ".join(f"{PREFIX}.{block}" for block in range(4))
FIRST = {"max_length": 8}


def tensor(**fields: object) -> runtime_pb2.Tensor:
    """A good hidden-state message ``[1, 2, 64]`` with some fields replaced."""
    good = {"buffer": b"\0" * 512, "size": [1, 2, 64], "dtype": "float32"}
    return runtime_pb2.Tensor(**{**good, **fields})


def message(hidden: runtime_pb2.Tensor | None = None, uid: str = UID, **metadata: object) -> Request:
    """A good first message with its first tensor, its uid or some metadata replaced."""
    request = stock_request(uid, [states(1, 2), DUMMY, DUMMY_INT64], {**FIRST, **metadata})
    if hidden is not None:
        request.tensors[0].CopyFrom(hidden)
    return request


def raw_metadata(data: bytes) -> Request:
    request = message()
    request.metadata = data
    return request


def only(count: int) -> Request:
    request = message(args_structure=None)
    del request.tensors[count:]
    return request


def many(count: int) -> Request:
    request = message()
    request.tensors.extend([runtime_pb2.Tensor()] * count)
    return request


def hypo_ids(count: int) -> Request:
    request = message()
    ids = runtime_pb2.Tensor(buffer=b"\0" * 8 * count, size=[count], dtype="int64")
    request.tensors[2].CopyFrom(ids)
    return request


def nan_values() -> bytes:
    return torch.full((1, 2, 64), math.nan).numpy().tobytes()


HOSTILE = {
    "a GiB claimed, nothing sent": (message(tensor(size=[1, GIB // 256, 64], buffer=b"")), "hidden states.buffer"),
    "more elements than exist": (message(tensor(size=[1, 2**32 - 1, 2**32 - 1])), "hidden states.size"),
    "too few bytes": (message(tensor(buffer=b"\0" * 511)), "hidden states.buffer"),
    "unknown dtype": (message(tensor(dtype="complex64")), "hidden states.dtype"),
    "attribute of torch as dtype": (message(tensor(dtype="load")), "hidden states.dtype"),
    "integers": (message(tensor(dtype="int32")), "hidden states"),
    "NaN": (message(tensor(buffer=nan_values())), "hidden states"),
    "unknown codec": (message(tensor(compression=77)), "hidden states.compression"),
    "damaged codec": (message(tensor(compression=4)), "hidden states.buffer"),
    "two dimensions": (message(tensor(size=[2, 64])), "tensors[0].size"),
    "no rows": (message(tensor(size=[0, 2, 64], buffer=b"")), "tensors[0].size"),
    "too many rows": (message(tensor(size=[2**31, 0, 64], buffer=b"")), "batch size"),
    "wrong hidden size": (message(tensor(size=[1, 1, 128])), "hidden states"),
    "two tensors": (only(2), "tensors"),
    "countless tensors": (many(1000), "tensors"),
    "a row number for everybody else": (hypo_ids(100_000), "hypo_ids"),
    "unknown model": (message(uid="other.0"), "other"),
    "unknown block": (message(uid=f"{PREFIX}.4"), "4:5"),
    "huge block": (message(uid=f"{PREFIX}.{10**30}"), "uid"),
    "no uid": (message(uid=""), "uid"),
    "endless uid": (message(uid="x" * 100_000), "uid"),
    "countless blocks": (message(uid=" ".join(f"{PREFIX}.{block}" for block in range(50_000))), "characters"),
    "repeated blocks": (message(uid=f"{PREFIX}.1 {PREFIX}.1"), "uid"),
    "metadata that is no msgpack": (raw_metadata(b"\xc1"), "metadata"),
    "metadata that is no map": (raw_metadata(MSGPackSerializer.dumps([1])), "metadata"),
    "metadata of a MiB": (raw_metadata(MSGPackSerializer.dumps({"a": "x" * 2**20})), "metadata"),
    "negative position": (message(start_from_position=-1), "start_from_position"),
    "huge position": (message(start_from_position=2**63), "start_from_position"),
    "huge length": (message(max_length=2**63), "max_length"),
    "points that are none": (message(points=None), "points"),
    "unknown adapter": (message(active_adapter="evil/adapter"), "active_adapter"),
    "adapter of the wrong type": (message(active_adapter=["x"]), "active_adapter"),
    "session id of the wrong type": (message(session_id=5), "session_id"),
    "endless session id": (message(session_id="x" * 1000), "session_id"),
    "step id of the wrong type": (message(step_id=["x"]), "step_id"),
    "next servers of the wrong type": (message(next_servers=5), "next_servers"),
    "next server without a span": (message(next_servers=[["a", "b", 1]]), "next_servers"),
    "next server with an empty span": (message(next_servers=[["a", "b", 3, 3]]), "next_servers"),
    "structure that names no tensor": (message(args_structure=((b"__T9",) * 3, {})), "args_structure"),
}  # fmt: skip


async def raw_stream(server: Server, client: Node, method: str = "rpc_inference") -> MessageStream:
    peer = PeerID.from_base58(server.node.peer_id)
    reader, writer = await _open_stream(client.p2p, peer, handle_name(method))
    frames = take_over(reader, writer, client.budget)
    return MessageStream(server.node.peer_id, frames, send_timeout_s=10)


async def good_step(stream: MessageStream, request: Request) -> torch.Tensor:
    await stream.send(request)
    answer = await stream.receive(Response)
    assert answer is not None
    return decode_tensor(answer.tensors[0], "answer")


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_session_is_refused_and_others_go_on(tiny: Server, client: Node, what: str) -> None:
    """The error names the field; a session open meanwhile steps on unharmed; all pages come back."""
    request, field = HOSTILE[what]
    bystander, hostile = await raw_stream(tiny, client), await raw_stream(tiny, client)
    before = await good_step(bystander, message(max_length=8))
    await hostile.send(request)
    with pytest.raises(RemoteError) as refusal:
        await hostile.receive(Response)
    assert re.search(": (bad_request|not_served): ", str(refusal.value)) and field in str(refusal.value)
    after = await good_step(bystander, message(start_from_position=0))
    assert torch.equal(before, after)
    hostile.close()
    await bystander.send(Request())
    await bystander.finish()


@pytest.mark.parametrize("method", ["rpc_forward", "rpc_backward"])
@pytest.mark.parametrize(
    "what", [key for key in HOSTILE if HOSTILE[key][1].startswith(("hidden", "uid", "points"))]
)
async def test_a_hostile_pass_is_refused(tiny: Server, client: Node, method: str, what: str) -> None:
    """Unary passes refuse the same requests by the same names."""
    request, field = HOSTILE[what]
    with pytest.raises(P2PHandlerError) as refusal:
        await getattr(tiny.stock(client), method)(request, timeout=20)
    assert str(refusal.value).startswith(("bad_request: ", "not_served: ")) and field in str(refusal.value)


def compressed(index: int, *size: int) -> Request:
    """A good message with sound 8-bit values, a byte for each, as one tensor; their shape does not fit."""
    header = (1).to_bytes(8, "little") + b"\0" * 4
    packed = tensor(buffer=header + b"\0" * math.prod(size), size=size, compression=runtime_pb2.UNIFORM_8BIT)
    request = message()
    request.tensors[index].CopyFrom(packed)
    return request


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of 8-bit tensors that are unpacked from here on."""
    shapes: list[tuple[int, ...]] = []

    def decode(buffer: bytes, shape: tuple[int, ...]) -> torch.Tensor:
        shapes.append(shape)
        return torch.zeros(shape)

    monkeypatch.setitem(codec._DECODERS, runtime_pb2.UNIFORM_8BIT, decode)
    return shapes


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (compressed(0, 1, 2, 128), "hidden states"),
        (compressed(0, 1, 9, 64), "max_length"),
        (compressed(1, 4, 1, 3, 64), "prompts"),
        (compressed(1, 999), "prompts"),
        (compressed(2, 1), "hypo_ids"),
    ],
)
async def test_compressed_tensors_of_a_step_are_unpacked_only_if_they_fit(
    tiny: Server, client: Node, unpacked: list[tuple[int, ...]], request_: Request, field: str
) -> None:
    """Each byte would become four or eight, so their shapes are held against the session before."""
    stream = await raw_stream(tiny, client)
    await stream.send(request_)
    with pytest.raises(RemoteError, match=f"bad_request: {field}"):
        await stream.receive(Response)
    stream.close()
    assert unpacked == []


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("rpc_forward", compressed(0, 1, 2, 128), "hidden states"),
        ("rpc_forward", compressed(0, 1, 10_000, 64), "hidden states"),
        ("rpc_forward", compressed(1, 4, 1, 3, 64), "prompts"),
        ("rpc_backward", compressed(0, 1, 2, 128), "hidden states"),
        ("rpc_backward", compressed(1, 1, 2, 128), "grad_outputs"),
        ("rpc_backward", compressed(2, 999), "prompts"),
    ],
)
async def test_compressed_tensors_of_a_pass_are_unpacked_only_if_they_fit(
    tiny: Server, client: Node, unpacked: list[tuple[int, ...]], method: str, request_: Request, field: str
) -> None:
    """As those of a step."""
    if method == "rpc_backward" and field == "prompts":
        request_.tensors[1].CopyFrom(tensor())
    with pytest.raises(P2PHandlerError, match=f"bad_request: {field}"):
        await getattr(tiny.stock(client), method)(request_, timeout=20)
    assert unpacked == []


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"\0" + (2**62).to_bytes(8, "big"), "message length"),
        (b"\x07" + (5).to_bytes(8, "big") + b"hello", "stream marker"),
        (b"\0" + (3).to_bytes(8, "big") + b"\xff\xff\xff", "message"),
        (b"\x01" + GIB.to_bytes(8, "big"), "message length"),
    ],
)
async def test_damaged_framing_is_refused(tiny: Server, client: Node, data: bytes, field: str) -> None:
    """Bytes that are no message, or claim to be a huge one, are answered with an error."""
    stream = await raw_stream(tiny, client)
    stream._frames.transport.write(data)
    with pytest.raises(RemoteError, match=f"bad_request: {field}"):
        await stream.receive(Response)
    stream.close()


async def test_a_claimed_gib_takes_no_memory(tiny: Server, client: Node) -> None:
    """A length within the limits holds nothing until its bytes come, and nothing once the peer is gone."""
    stream = await raw_stream(tiny, client)
    stream._frames.transport.write(b"\0" + (GIB // 2).to_bytes(8, "big") + b"x" * 1000)
    other = await raw_stream(tiny, client)
    assert (await good_step(other, message())).shape == (1, 2, 64)
    assert tiny.node.budget.held_bytes <= 1000
    stream.close()
    other.close()
    await tiny.idle()
    assert tiny.node.budget.held_bytes == 0


async def test_only_typed_errors_are_told(
    tiny: Server, client: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected failure reaches the peer as a code and an id; its text stays with us."""

    async def broken(*_: object) -> None:
        raise RuntimeError("secret path /root/key")

    monkeypatch.setattr(tiny.engine, "forward", broken)
    with pytest.raises(P2PHandlerError) as refusal:
        await tiny.stock(client).rpc_forward(stock_request(UID, [states(1, 1), DUMMY], {}), timeout=20)
    assert str(refusal.value).startswith("internal_error: ") and "secret" not in str(refusal.value)


async def test_a_push_must_name_its_session(tiny: Server, client: Node) -> None:
    """A push without a session id or for blocks that are not ours is refused; an unknown id is ignored."""
    stub = tiny.stock(client)
    with pytest.raises(P2PHandlerError, match="bad_request: session_id"):
        await stub.rpc_push(stock_request(UID, [states(1, 1)], {}), timeout=10)
    with pytest.raises(P2PHandlerError, match="not_served"):
        await stub.rpc_push(stock_request("other.0", [states(1, 1)], {"session_id": "x"}), timeout=10)
    assert not (
        await stub.rpc_push(stock_request(UID, [states(1, 1)], {"session_id": "x"}), timeout=10)
    ).tensors
