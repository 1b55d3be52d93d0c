"""How many fields a protobuf message has, told without parsing it."""

from __future__ import annotations

_VARINT, _FIXED64, _BYTES, _GROUP_START, _GROUP_END, _FIXED32 = range(6)
_MAX_VARINT_BYTES = 10


def has_more_fields(data: bytes | memoryview, most: int) -> bool:
    """Whether a message has more than ``most`` fields of its own; False for what is damaged before that.

    An empty field takes two bytes here, and fifty once it is parsed. Reads the heads of ``most`` fields at most.
    """
    at = 0
    for _ in range(most):
        if at >= len(data):
            return False
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            length, at = _varint(data, at)
            at += length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        elif kind not in (_GROUP_START, _GROUP_END):
            return False
    return at < len(data)


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number at ``at`` and where what follows begins; behind the end of the data for one that is cut off."""
    number = 0
    for shift in range(_MAX_VARINT_BYTES):
        if at + shift >= len(data):
            break
        byte = data[at + shift]
        number |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return number, at + shift + 1
    return number, len(data)
