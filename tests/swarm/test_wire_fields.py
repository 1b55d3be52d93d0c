"""Counting a message's fields before they are parsed."""

from __future__ import annotations

from hivemind.proto.runtime_pb2 import ExpertRequest, Tensor
from hypothesis import given
from hypothesis import strategies as st

from petalsd.swarm.wire_fields import has_more_fields


@given(st.integers(0, 40), st.binary(max_size=300), st.integers(0, 50))
def test_fields_are_counted_as_they_are_parsed(num_tensors: int, metadata: bytes, most: int) -> None:
    """Whatever is inside of them, and a field that is empty only counts where it repeats."""
    tensor = Tensor(buffer=metadata, size=[1, 300, 70_000], chunks=-1)
    data = ExpertRequest(uid="u.1", tensors=[tensor] * num_tensors, metadata=metadata).SerializeToString()
    num_fields = 1 + num_tensors + bool(metadata)
    assert has_more_fields(memoryview(data), most) == (num_fields > most)


@given(st.binary(max_size=60), st.integers(0, 8))
def test_damaged_bytes_are_no_reason_to_fail(data: bytes, most: int) -> None:
    """What is no message, the parser refuses."""
    assert has_more_fields(data, most) in (False, True)


def test_numbers_of_fixed_size_are_fields_too() -> None:
    assert has_more_fields(b"\x09" + b"\0" * 8 + b"\x0d" + b"\0" * 4 + b"\x08\x01", 2)
    assert not has_more_fields(b"\x09" + b"\0" * 8 + b"\x0d" + b"\0" * 4 + b"\x08\x01", 3)
