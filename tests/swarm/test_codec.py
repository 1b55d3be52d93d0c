"""Tensors and metadata: what we write, all that we read, and what is refused before memory is spent."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hivemind.compression.serialization import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hypothesis import given
from hypothesis import strategies as st

from petalsd.errors import BadRequest
from petalsd.swarm import codec

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def proto(**fields: object) -> runtime_pb2.Tensor:
    """A float32 message of two values, with some fields replaced."""
    return runtime_pb2.Tensor(**{"buffer": b"\0" * 8, "size": [1, 2], "dtype": "float32", **fields})


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (0,), (2, 0, 4), (), (1, 1, 1)])
def test_a_tensor_survives_the_wire(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Any dtype and shape comes back bit for bit."""
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape).to(dtype)
    back = codec.decode_tensor(codec.encode_tensor(tensor), "x")
    assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_stock_peers_read_what_we_write(dtype: torch.dtype) -> None:
    """hivemind's own reader gets the same values, two-byte bfloat16 included (checklist 8, 17)."""
    tensor = torch.randn(2, 3).mul(100).to(dtype)
    message = codec.encode_tensor(tensor)
    assert len(message.buffer) == tensor.nbytes and not message.requires_grad
    assert torch.equal(deserialize_torch_tensor(message), tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_we_read_what_stock_peers_write(dtype: torch.dtype) -> None:
    """hivemind's own writer is understood, four-byte bfloat16 included (checklist 8)."""
    tensor = torch.randn(2, 3).to(dtype)
    assert torch.equal(codec.decode_tensor(serialize_torch_tensor(tensor), "x"), tensor)


@pytest.mark.parametrize(
    ("codec_id", "tolerance"),
    [
        (runtime_pb2.FLOAT16, 1e-3),
        (runtime_pb2.MEANSTD_16BIT, 1e-3),
        (runtime_pb2.UNIFORM_8BIT, 0.02),
        (runtime_pb2.QUANTILE_8BIT, 0.02),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
def test_compressed_tensors_are_read(codec_id: int, tolerance: float) -> None:
    """Every codec that a stock peer may choose is decoded to about the values it was given."""
    tensor = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0))
    back = codec.decode_tensor(serialize_torch_tensor(tensor, codec_id), "x")
    assert back.dtype == torch.float32 and back.shape == tensor.shape
    assert (back - tensor).abs().mean() < tolerance


def test_block_wise_8_bit_is_read() -> None:
    """Codes are picked per value and scaled per 4096 values."""
    num = 4096 + 5
    codes, scales = torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([2.0, 10.0])
    picks = torch.arange(num, dtype=torch.uint8) % 3
    counts = torch.tensor([2, 3], dtype=torch.int64)
    buffer = b"".join(part.numpy().tobytes() for part in (counts, scales, codes, picks))
    message = proto(buffer=buffer, size=[num], compression=runtime_pb2.BLOCKWISE_8BIT)
    expected = codes[picks.long()] * torch.where(torch.arange(num) < 4096, 2.0, 10.0)
    assert torch.equal(codec.decode_tensor(message, "x"), expected)


def packed_zeros(codec_id: int, num_values: int) -> runtime_pb2.Tensor:
    """Zeros in rows of 4096, as little as each codec needs for them."""
    rows, one = num_values // 4096, (1).to_bytes(8, "little")
    parts = {
        runtime_pb2.FLOAT16: [bytes(2 * num_values)],
        runtime_pb2.MEANSTD_16BIT: [bytes(2 * num_values), bytes(8 * rows)],
        runtime_pb2.UNIFORM_8BIT: [one, bytes(4), bytes(num_values)],
        runtime_pb2.BLOCKWISE_8BIT: [
            rows.to_bytes(8, "little"), one, bytes(4 * rows), bytes(4), bytes(num_values)
        ],
    }  # fmt: skip
    return proto(buffer=b"".join(parts[codec_id]), size=[rows, 4096], compression=codec_id)


def resident_bytes(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize(
    "codec_id",
    [
        runtime_pb2.FLOAT16,
        runtime_pb2.MEANSTD_16BIT,
        runtime_pb2.UNIFORM_8BIT,
        runtime_pb2.BLOCKWISE_8BIT,
    ],
)
def test_unpacking_takes_little_more_than_the_values(codec_id: int) -> None:
    """At its peak no more than the values and the bytes again: not the eightfold for indices, or copies."""
    num_values = 16 << 20
    message = packed_zeros(codec_id, num_values)
    codec.decode_tensor(packed_zeros(codec_id, 4096), "x")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before = resident_bytes("VmRSS")
    values = codec.decode_tensor(message, "x")
    taken = resident_bytes("VmHWM") - before
    assert taken < 1.5 * values.nbytes + len(message.buffer)


@pytest.mark.parametrize("codec_id", [1, 2, 3, 4, 5])
def test_an_empty_compressed_tensor_is_empty(codec_id: int) -> None:
    """Clients compress dummies too; what the codec wrote for them does not matter."""
    message = proto(size=[0], buffer=b"\xff" * 8, compression=codec_id)
    assert codec.is_dummy(codec.decode_tensor(message, "x"))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (proto(dtype="complex64"), "x.dtype"),
        (proto(dtype="object"), "x.dtype"),
        (proto(dtype=""), "x.dtype"),
        (proto(buffer=b""), "x.buffer"),
        (proto(buffer=b"\0" * 7), "x.buffer"),
        (proto(buffer=b"\0" * 16), "x.buffer"),
        (proto(size=[2**28], buffer=b""), "x.buffer"),
        (proto(size=[2**32 - 1] * 8), "x.size"),
        (proto(size=[1] * 9), "x.size"),
        (proto(size=[1] * 10**6), "x.size"),
        (proto(size=[2**32 - 1, 2**32 - 1, 0], buffer=b""), "x.size"),
        (proto(compression=2, buffer=b"\0" * 3), "x.buffer"),
        (proto(compression=1), "x.buffer"),
        (proto(compression=3), "x.buffer"),
        (proto(compression=4, buffer=b"\xff" * 30), "x.buffer"),
        (proto(compression=4, buffer=(1).to_bytes(8, "little") + b"\0" * 4 + b"\x00\x01"), "x.buffer"),
        (proto(compression=5, buffer=b"\xff" * 40), "x.buffer"),
        (proto(compression=5, buffer=b""), "x.buffer"),
        (proto(compression=2, dtype="int64"), "x.compression"),
        (proto(buffer=torch.tensor([0.0, math.nan]).numpy().tobytes()), "x"),
        (proto(buffer=torch.tensor([math.inf, 0.0]).numpy().tobytes()), "x"),
    ],
)
def test_a_bad_tensor_is_refused_with_the_field(message: runtime_pb2.Tensor, field: str) -> None:
    """Wrong dtypes, sizes that do not fit the bytes, damaged codecs and NaN are BadRequests naming the field."""
    with pytest.raises(BadRequest) as refusal:
        codec.decode_tensor(message, "x")
    assert refusal.value.field == field


@given(
    buffer=st.binary(max_size=64),
    size=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from([*codec.DTYPES, "x"]),
    compression=st.integers(0, 5),
)
def test_any_bytes_decode_or_are_refused(
    buffer: bytes, size: list[int], dtype: str, compression: int
) -> None:
    """No combination of fields makes the decoder fail in any other way than with BadRequest."""
    message = runtime_pb2.Tensor(buffer=buffer, size=size, dtype=dtype, compression=compression)
    try:
        tensor = codec.decode_tensor(message, "x")
    except BadRequest:
        return
    assert list(tensor.shape) == size


@pytest.mark.parametrize("part_bytes", [1, 7, 24, 1000])
def test_a_tensor_survives_being_cut_into_parts(part_bytes: int) -> None:
    """Parts put together are the tensors that were cut, whatever the size of the parts."""
    tensors = [torch.arange(6, dtype=torch.float32), codec.DUMMY, torch.ones(2, 3, dtype=torch.bfloat16)]
    assembler = codec.TensorAssembler(max_bytes=1000)
    for tensor in tensors:
        for part in codec.split_for_stream(codec.encode_tensor(tensor), part_bytes):
            assembler.add(part)
    back = [codec.decode_tensor(message, "x") for message in assembler.finish()]
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_assembling_is_bounded() -> None:
    """More bytes or more tensors than allowed, and a part without a beginning, are refused."""
    with pytest.raises(BadRequest, match="at most 4 in one request"):
        codec.TensorAssembler(max_bytes=4).add(proto())
    assembler = codec.TensorAssembler(max_bytes=100, max_tensors=1)
    assembler.add(proto())
    with pytest.raises(BadRequest, match="at most 1 in one request"):
        assembler.add(proto())
    with pytest.raises(BadRequest, match="first part"):
        codec.TensorAssembler(max_bytes=100).add(runtime_pb2.Tensor(buffer=b"x"))


METADATA = {"a": (1, ("b", 2.5), [None, True]), "args_structure": codec.pack_structure(3)}


def test_metadata_is_packed_as_stock_peers_pack_it() -> None:
    """Tuples stay tuples and bytes stay bytes, in both directions."""
    assert codec.encode_metadata(METADATA) == MSGPackSerializer.dumps(METADATA)
    assert codec.decode_metadata(MSGPackSerializer.dumps(METADATA)) == METADATA
    assert codec.decode_metadata(b"") == {}


@pytest.mark.parametrize("item", [{}, [], (), [[]] * 100, {str(key): {} for key in range(20)}])
def test_metadata_of_countless_values_is_refused(item: object) -> None:
    """Up to seventy times as large in memory as on the wire, and steps that wait keep theirs."""
    data = MSGPackSerializer.dumps({"a": [item] * 2048})
    with pytest.raises(BadRequest, match=r"metadata.*at most 2048 values"):
        codec.decode_metadata(data)


def test_metadata_may_name_a_long_chain() -> None:
    """256 servers with long names are no more than is allowed."""
    metadata = {
        **METADATA,
        "next_servers": [("Q" * 60, "s" * 36, number, number + 1) for number in range(256)],
    }
    assert codec.decode_metadata(MSGPackSerializer.dumps(metadata)) == metadata


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x01",
        b"\x91",
        MSGPackSerializer.dumps([1]),
        MSGPackSerializer.dumps({b"k": 1}),
        b"\x81\xa1a\xc7\x01\x51x",
        b"\x81\xa1a" + b"\x91" * 2000 + b"\x01",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x80" * (codec.MAX_METADATA_BYTES + 1),
    ],
)
def test_bad_metadata_is_refused(data: bytes) -> None:
    """Anything but one small map with text keys is a BadRequest on the field metadata."""
    with pytest.raises(BadRequest) as refusal:
        codec.decode_metadata(data)
    assert refusal.value.field == "metadata"


def test_tuples_cannot_nest_without_end() -> None:
    """A tuple in a tuple in a tuple ... is refused before it exhausts the stack."""
    nested: object = 1
    for _ in range(50):
        nested = (nested,)
    with pytest.raises(BadRequest, match="metadata"):
        codec.decode_metadata(MSGPackSerializer.dumps({"a": nested}))


def test_foreign_values_are_not_sent() -> None:
    """Only plain Python values go into metadata (checklist 17)."""
    with pytest.raises(TypeError, match="Tensor"):
        codec.encode_metadata({"a": torch.ones(1)})


def test_args_structure_places_the_tensors() -> None:
    """Markers order and repeat the tensors sent; None leaves them as they are; more are ignored."""
    first, second = proto(size=[2]), proto(size=[1, 2])
    assert codec.arrange([first, second], None, 1) == [first]
    assert codec.arrange([first, second], codec.pack_structure(2), 2) == [first, second]
    assert codec.arrange([first, second], [[b"__T1", b"__T0", b"__T1"], {}], 3) == [second, first, second]


@pytest.mark.parametrize(
    "structure",
    [
        5,
        ((b"__T0",),),
        (5, {}),
        ((b"__T2", b"__T0"), {}),
        ((b"x", b"__T0"), {}),
        ((b"__T-1", b"__T0"), {}),
        (("__T0", "__T1"), {}),
    ],
)
def test_a_bad_args_structure_is_refused(structure: object) -> None:
    """Structures that name no tensor that came are BadRequests."""
    with pytest.raises(BadRequest) as refusal:
        codec.arrange([proto(), proto()], structure, 2)
    assert refusal.value.field == "args_structure"


def test_too_few_tensors_are_refused() -> None:
    """The refusal says how many the call needs."""
    with pytest.raises(BadRequest, match="needs 3"):
        codec.arrange([proto()], None, 3)


def test_parts_keep_the_codec() -> None:
    """The first part of a cut tensor carries its codec, so that every codec may be streamed."""
    message = proto(compression=runtime_pb2.FLOAT16)
    assert next(codec.split_for_stream(message)).compression == runtime_pb2.FLOAT16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    """One NaN or infinity among large and small numbers is refused; the numbers alone are not."""
    tensor = torch.tensor([1.0, -3e4, 6e-5, 0.0]).to(dtype)
    assert torch.equal(codec.decode_tensor(codec.encode_tensor(tensor), "x"), tensor)
    tensor[2] = value
    with pytest.raises(BadRequest, match="finite"):
        codec.decode_tensor(codec.encode_tensor(tensor), "x")
