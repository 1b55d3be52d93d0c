"""In what form a block's weights are kept, and what that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from petalsd.config import Quantization
from petalsd.ops.packed_weight import PackedLayout, WeightFormat

_PACKED_DTYPES = {torch.float32: WeightFormat.FLOAT32, torch.bfloat16: WeightFormat.BFLOAT16}
_QUANTIZED = {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}


@dataclass(frozen=True, slots=True)
class WeightStorage:
    """Norms and biases are tensors of ``dtype``; projections are packed in ``format``, or tensors if it is None.

    ``dtype`` is also that of hidden states and cache.
    """

    dtype: torch.dtype
    device: torch.device
    format: WeightFormat | None

    @classmethod
    def choose(
        cls, dtype: torch.dtype, device: torch.device, quantization: Quantization = "none"
    ) -> WeightStorage:
        """Packed when quantized, and on the CPU wherever there is a format for the dtype."""
        if device.type == "cpu" or quantization in _QUANTIZED:
            return cls(dtype, device, _QUANTIZED.get(quantization, _PACKED_DTYPES.get(dtype)))
        return cls(dtype, device, None)

    @property
    def quantization(self) -> Quantization:
        if self.format is WeightFormat.INT8:
            return "int8"
        return "int4" if self.format is WeightFormat.INT4 else "none"

    def nbytes(self, shapes: Iterable[Sequence[int]]) -> int:
        """What these weights take; the two-dimensional ones are projections.

        When several are fused into one it is what they take at most, since only the last then has padding.
        """
        return sum(self._tensor_nbytes(shape) for shape in shapes)

    def _tensor_nbytes(self, shape: Sequence[int]) -> int:
        if self.format is not None and len(shape) == 2:
            return PackedLayout(self.format, shape[0], shape[1]).nbytes
        return math.prod(shape) * self.dtype.itemsize
