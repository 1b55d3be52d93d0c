"""Packed weights as the C++ code reads them."""

from __future__ import annotations

from petalsd import _C
from petalsd.ops.packed_weight import PackedWeight

_NO_TENSOR = 0


def native_weight(weight: PackedWeight) -> _C.PackedWeight:
    """The C++ view of a weight, which must outlive it."""
    scales = _NO_TENSOR if weight.scales is None else weight.scales.data_ptr()
    return _C.PackedWeight(weight.format.value, weight.num_out, weight.num_in, weight.data.data_ptr(), scales)
