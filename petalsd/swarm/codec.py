"""Tensors and metadata between protobuf bytes and Python: every remote byte is checked here, before use.

Sizes are compared with the bytes that really came before anything is allocated. We send raw values
(compression NONE, bfloat16 as two bytes) and read everything a stock peer may send.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import msgpack
import numpy as np
import torch
from hivemind.proto import runtime_pb2

from petalsd.errors import BadRequest
from petalsd.swarm import compression
from petalsd.swarm.protocol import MAX_METADATA_BYTES, MAX_PART_BYTES, MAX_TENSORS

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ARRAY_DTYPES = {dtype: np.dtype("int16" if name == "bfloat16" else name) for name, dtype in DTYPES.items()}
_DECODERS: dict[int, Callable[[bytes, tuple[int, ...]], torch.Tensor]] = {
    runtime_pb2.FLOAT16: compression.decode_float16,
    runtime_pb2.MEANSTD_16BIT: compression.decode_meanstd,
    runtime_pb2.QUANTILE_8BIT: compression.decode_codebook,
    runtime_pb2.UNIFORM_8BIT: compression.decode_codebook,
    runtime_pb2.BLOCKWISE_8BIT: compression.decode_blockwise,
}
_ANY_PARTS, _MEAN_PART_BYTES = 1024, 4096  # stock peers send parts of 64 KiB and more
_MAX_DIMS = 8
_MAX_ELEMENTS = 2**40
_TUPLE = 0x40  # hivemind's msgpack extension for tuples: the payload is a msgpack array
_MAX_TUPLE_DEPTH = 8
_MAX_KNOWN_TUPLES, _MAX_KNOWN_BYTES = 256, 256
_MAX_ITEMS, _FEW_BYTES = 2048, 2048  # a chain of 256 servers has 1300 items; fewer bytes cannot hold many
_KEY_TYPES = {str}

# Stand for absent optional tensors, which must still be sent to keep positions. Never written to.
DUMMY = torch.empty(0, dtype=torch.float32)
DUMMY_INT64 = torch.empty(0, dtype=torch.int64)
_DUMMIES = {"float32": DUMMY, "int64": DUMMY_INT64}
_BFLOAT16_EXPONENT = 0x7F80  # all its bits are set in infinities and NaNs only


def is_dummy(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0


# --------------------------------------------------------------------------------------------- tensors


def encode_tensor(tensor: torch.Tensor) -> runtime_pb2.Tensor:
    """Any CPU tensor of a dtype in DTYPES -> its message, uncompressed. Dummies share theirs: never change it."""
    if tensor is DUMMY or tensor is DUMMY_INT64:
        return _encoded_dummy(_NAMES[tensor.dtype])
    return runtime_pb2.Tensor(
        buffer=_bytes(tensor.detach() if tensor.requires_grad else tensor),
        size=tensor.shape,
        dtype=_NAMES[tensor.dtype],
        compression=runtime_pb2.NONE,
    )


@cache
def _encoded_dummy(dtype: str) -> runtime_pb2.Tensor:
    return runtime_pb2.Tensor(size=(0,), dtype=dtype, compression=runtime_pb2.NONE)


def _bytes(tensor: torch.Tensor) -> bytes:
    """Row after row, whatever the strides."""
    raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return raw.numpy().tobytes()


def decode_tensor(proto: runtime_pb2.Tensor, field: str) -> torch.Tensor:
    """A message -> a CPU tensor. BadRequest names ``field`` and what is wrong with it.

    Floats are finite afterwards. Cost: one copy of the bytes and one pass over the values.
    """
    if (
        len(proto.size) == 1
        and (dummy := _DUMMIES.get(proto.dtype)) is not None
        and _stands_for_nothing(proto)
    ):
        return dummy
    shape, dtype = _shape(proto, field), _dtype(proto, field)
    tensor = _decode_buffer(proto, shape, dtype, field)
    if dtype.is_floating_point and not _is_finite(tensor):
        raise BadRequest(field, f"{proto.dtype} {list(shape)}", "values must be finite, NaN or infinity came")
    return tensor


def is_compressed(proto: runtime_pb2.Tensor) -> bool:
    """Whether its values may take more memory than its bytes do, up to eight times as much."""
    return bool(proto.compression != runtime_pb2.NONE)


def unpacked_bytes(tensors: Iterable[runtime_pb2.Tensor]) -> int:
    """What the compressed ones of them may take once they are unpacked; the others take what they do now."""
    return sum(len(proto.buffer) * _growth(proto) for proto in tensors if is_compressed(proto))


def _growth(proto: runtime_pb2.Tensor) -> int:
    """How many bytes one of its buffer may become."""
    return DTYPES.get(proto.dtype, torch.float64).itemsize if is_compressed(proto) else 1


def outline(proto: runtime_pb2.Tensor, field: str) -> torch.Tensor:
    """The shape and dtype that ``decode_tensor`` would return, without memory: on the device ``meta``."""
    return torch.empty(_shape(proto, field), dtype=_dtype(proto, field), device="meta")


def _stands_for_nothing(proto: runtime_pb2.Tensor) -> bool:
    return proto.size[0] == 0 and proto.compression == runtime_pb2.NONE and not proto.buffer


def _is_finite(tensor: torch.Tensor) -> bool:
    """Through NumPy: on one token's states it takes 2 us where torch.isfinite takes 40."""
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return not bool(((bits & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any())
    finite = np.isfinite(tensor.numpy())
    return bool(np.count_nonzero(finite) == finite.size)


def _shape(proto: runtime_pb2.Tensor, field: str) -> tuple[int, ...]:
    if len(proto.size) > _MAX_DIMS:
        raise BadRequest(f"{field}.size", proto.size[:16], f"at most {_MAX_DIMS} dimensions")
    shape = tuple(proto.size)
    numel = math.prod(shape)
    if numel > _MAX_ELEMENTS or (numel == 0 and math.prod(dim or 1 for dim in shape) > _MAX_ELEMENTS):
        raise BadRequest(f"{field}.size", list(shape), "more elements than any request may have")
    return shape


def _dtype(proto: runtime_pb2.Tensor, field: str) -> torch.dtype:
    dtype = DTYPES.get(proto.dtype)
    if dtype is None:
        raise BadRequest(f"{field}.dtype", proto.dtype, f"one of {', '.join(DTYPES)}")
    return dtype


def _decode_buffer(
    proto: runtime_pb2.Tensor, shape: tuple[int, ...], dtype: torch.dtype, field: str
) -> torch.Tensor:
    if proto.compression == runtime_pb2.NONE:
        return _decode_raw(proto.buffer, shape, dtype, field)
    decoder = _DECODERS.get(proto.compression)
    if decoder is None or not dtype.is_floating_point:
        raise BadRequest(f"{field}.compression", proto.compression, f"not usable for {proto.dtype}")
    if math.prod(shape) == 0:  # what codecs write for an empty tensor is of no use
        return torch.empty(shape, dtype=dtype)
    try:
        return decoder(proto.buffer, shape).to(dtype)
    except ValueError as error:
        raise BadRequest(f"{field}.buffer", f"{len(proto.buffer)} bytes", str(error)) from None


def _decode_raw(buffer: bytes, shape: tuple[int, ...], dtype: torch.dtype, field: str) -> torch.Tensor:
    """Through NumPy as far as it goes: one call into torch instead of four, which counts in a decode step."""
    numel = math.prod(shape)
    stored = dtype
    if dtype == torch.bfloat16 and numel and len(buffer) == 4 * numel:
        stored = torch.float32  # how stock hivemind sends bfloat16 unless told otherwise
    expected = numel * stored.itemsize
    if len(buffer) != expected:
        raise BadRequest(
            f"{field}.buffer",
            f"{len(buffer)} bytes",
            f"size {list(shape)} of {_NAMES[dtype]} needs {expected}",
        )
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    values = torch.from_numpy(np.ndarray(shape, _ARRAY_DTYPES[stored], bytearray(buffer)))
    if dtype == torch.bfloat16:
        return values.view(dtype) if stored == dtype else values.to(dtype)
    return values


# ------------------------------------------------------------------------------- tensors in many parts


def split_for_stream(
    proto: runtime_pb2.Tensor, part_bytes: int = MAX_PART_BYTES
) -> Iterator[runtime_pb2.Tensor]:
    """Cut one tensor message into parts; the first carries everything but the rest of the buffer."""
    buffer = proto.buffer
    yield runtime_pb2.Tensor(
        buffer=buffer[:part_bytes],
        size=proto.size,
        dtype=proto.dtype,
        compression=proto.compression,
        chunks=-(-len(buffer) // part_bytes),
    )
    for start in range(part_bytes, len(buffer), part_bytes):
        yield runtime_pb2.Tensor(buffer=buffer[start : start + part_bytes])


class TensorAssembler:
    """Puts tensors together from parts; holds at most ``max_bytes`` and ``max_tensors``.

    A thousand parts may be of any size, and more where they bring something: each costs time.
    """

    def __init__(self, max_bytes: int, max_tensors: int = MAX_TENSORS) -> None:
        self._max_bytes = max_bytes
        self._max_tensors = max_tensors
        self._num_bytes = self._num_parts = 0
        self._growth = 1
        self._heads: list[runtime_pb2.Tensor] = []
        self._buffers: list[list[bytes]] = []

    def add(self, part: runtime_pb2.Tensor) -> int:
        """A part with a dtype begins a tensor, one without continues the last; BadRequest past the limits.

        Return the bytes that it may take once it is unpacked.
        """
        buffer = part.buffer
        self._num_bytes += len(buffer)
        if self._num_bytes > self._max_bytes:
            raise BadRequest(
                "tensors", f"over {self._num_bytes} bytes", f"at most {self._max_bytes} in one request"
            )
        self._num_parts += 1
        if self._num_parts > _ANY_PARTS + self._num_bytes // _MEAN_PART_BYTES:
            raise BadRequest("tensors", f"{self._num_parts} parts", f"{self._num_bytes} bytes need fewer")
        if part.dtype:
            if len(self._heads) >= self._max_tensors:
                raise BadRequest(
                    "tensors", len(self._heads) + 1, f"at most {self._max_tensors} in one request"
                )
            self._growth = _growth(part)
            self._heads.append(part)
            self._buffers.append([buffer])
        elif self._buffers:
            self._buffers[-1].append(buffer)
        else:
            raise BadRequest("tensors[0].dtype", "", "the first part of a tensor names its dtype")
        return len(buffer) * self._growth

    def finish(self) -> list[runtime_pb2.Tensor]:
        """The whole tensors, in the order they began."""
        for head, buffers in zip(self._heads, self._buffers, strict=True):
            if len(buffers) > 1:
                head.buffer = b"".join(buffers)
        return self._heads


# -------------------------------------------------------------------------------------------- metadata


def encode_metadata(metadata: Mapping[str, object]) -> bytes:
    """Plain Python values only; tuples stay tuples, anything else of a foreign type is a TypeError."""
    return bytes(msgpack.packb(dict(metadata), default=_pack_tuple, strict_types=True, use_bin_type=True))


def decode_metadata(data: bytes) -> dict[str, Any]:
    """The metadata field of a request; empty means none. BadRequest when it is not one small map."""
    if not data:
        return {}
    if len(data) > MAX_METADATA_BYTES:
        raise BadRequest("metadata", f"{len(data)} bytes", f"at most {MAX_METADATA_BYTES} bytes")
    try:
        value = _unpack(data)
    except Exception as error:  # msgpack raises many kinds, all of them about these bytes
        raise BadRequest("metadata", f"{len(data)} bytes", f"not msgpack: {type(error).__name__}") from None
    if not isinstance(value, dict) or not set(map(type, value)) <= _KEY_TYPES:
        raise BadRequest("metadata", type(value).__name__, "must be a map with text keys")
    if len(data) > _FEW_BYTES and _has_more_items(value, _MAX_ITEMS):
        raise BadRequest("metadata", f"{len(data)} bytes", f"at most {_MAX_ITEMS} values")
    return value


def _has_more_items(value: object, most: int) -> bool:
    """Whether there are more values inside: an empty map is one byte on the wire and 70 in memory."""
    count, inside = 0, [value]
    while inside and count + len(inside) <= most:
        item = inside.pop()
        count += 1
        if isinstance(item, dict):
            inside.extend(item.values())
        elif isinstance(item, list | tuple):
            inside.extend(item)
    return bool(inside)


def _pack_tuple(value: object) -> msgpack.ExtType:
    if not isinstance(value, tuple):
        raise TypeError(f"cannot send a {type(value).__name__}, convert it to a plain Python value")
    packed = msgpack.packb(list(value), default=_pack_tuple, strict_types=True, use_bin_type=True)
    return msgpack.ExtType(_TUPLE, packed)


def _unpack(data: bytes, depth: int = 0) -> object:
    if depth > _MAX_TUPLE_DEPTH:
        raise ValueError("tuples nested too deeply")
    return msgpack.unpackb(data, ext_hook=_TUPLE_HOOKS[depth], raw=False)


def _unpack_tuple(depth: int, code: int, payload: bytes) -> object:
    unpack = _unpack_known if len(payload) <= _MAX_KNOWN_BYTES else _unpack_items
    return unpack(depth, code, payload)


def _unpack_items(depth: int, code: int, payload: bytes) -> object:
    if code != _TUPLE:
        raise ValueError(f"extension {code} has no place in metadata")
    items = _unpack(payload, depth + 1)
    if not isinstance(items, list):
        raise ValueError("a tuple is sent as an array")
    return tuple(items)


# The tuples of a session are the same in each of its messages, and nobody changes what is in them.
_unpack_known = lru_cache(_MAX_KNOWN_TUPLES)(_unpack_items)
_TUPLE_HOOKS = [partial(_unpack_tuple, depth) for depth in range(_MAX_TUPLE_DEPTH + 1)]


# ------------------------------------------------------------------------------------- args_structure


@cache
def pack_structure(num_tensors: int) -> tuple[tuple[bytes, ...], dict[str, object]]:
    """The ``args_structure`` of that many positional tensors."""
    return tuple(b"__T%d" % index for index in range(num_tensors)), {}


@cache
def packed_structure(num_tensors: int) -> msgpack.ExtType:
    """The same, as it goes into a message."""
    return _pack_tuple(pack_structure(num_tensors))


def arrange(
    tensors: Sequence[runtime_pb2.Tensor], structure: object, num_needed: int
) -> list[runtime_pb2.Tensor]:
    """The first ``num_needed`` positional tensors of a request, as its ``args_structure`` places them.

    None means as sent. Further tensors and keyword arguments are ignored, as stock servers do.
    """
    if structure is None or structure == pack_structure(num_needed):
        order: Sequence[object] = range(len(tensors))
    else:
        order = [_marker_index(marker, len(tensors)) for marker in _positional(structure)[:num_needed]]
    if len(order) < num_needed:
        raise BadRequest("tensors", f"{len(order)} of them", f"this call needs {num_needed}")
    return [tensors[index] for index in order[:num_needed] if isinstance(index, int)]


def _positional(structure: object) -> Sequence[object]:
    if isinstance(structure, tuple | list) and len(structure) == 2 and isinstance(structure[0], tuple | list):
        return structure[0]
    raise BadRequest("args_structure", structure, "must be (positional arguments, keyword arguments)")


def _marker_index(marker: object, num_tensors: int) -> int:
    text = marker[3:] if isinstance(marker, bytes) and marker.startswith(b"__T") else b""
    if not text.isdigit() or len(text) > 4 or int(text) >= num_tensors:
        raise BadRequest("args_structure", marker, f"must be __T0 to __T{num_tensors - 1}, the tensors sent")
    return int(text)
