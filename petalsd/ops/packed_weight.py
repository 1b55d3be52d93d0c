"""The storage of a projection's weights: one layout in four formats, read by the CPU kernels and those of GPUs.

``W`` is ``[N, K]``. N is padded to tiles of 16 outputs, K to a multiple of 1, 32, 64 and 64, both with zeros. In
every format a tile is the transpose of 16 rows of 32-bit words: the w-th words of its outputs lie side by side,
so that a kernel computes 16 outputs from consecutive memory.

format    inputs in a word   data                               scales
float32   1                  float32 ``[N/16, K, 16]``          none
bfloat16  2                  bfloat16 ``[N/16, K/2, 16, 2]``    none
int8      4                  uint8 ``[N/16, K/4, 16, 4]``       float32 ``[N]``, one per output
int4      8                  uint8 ``[N/16, K/64, 8, 16, 4]``   bfloat16 ``[N/16, K/64, 16]``, one per output and
                                                                64 inputs

int8 holds q + 128 for q in -127..127 with w = q * scale. int4 holds q + 8 for q in -8..7; byte b of a word has
input b in its low half and input b + 4 in its high half. How scales are chosen: ``csrc/weight_storage.hpp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from petalsd import _C
from petalsd.ops import memory

TILE_OUTPUTS = 16
GROUP_INPUTS = 64
INT8_ZERO = 128
INT4_ZERO = 8

_UNPACKED_AT_ONCE = 1 << 23  # values: they fill a GPU, and take little memory beside the weights
_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_NO_TENSOR = 0

Allocate = Callable[[Sequence[int], torch.dtype], torch.Tensor]


class WeightFormat(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def inputs_per_word(self) -> int:
        return _INPUTS_PER_WORD[self]

    @property
    def is_quantized(self) -> bool:
        return self in (WeightFormat.INT8, WeightFormat.INT4)


_INPUTS_PER_WORD = {
    WeightFormat.FLOAT32: 1,
    WeightFormat.BFLOAT16: 2,
    WeightFormat.INT8: 4,
    WeightFormat.INT4: 8,
}
_INPUT_MULTIPLES = {
    WeightFormat.FLOAT32: 1,
    WeightFormat.BFLOAT16: 32,
    WeightFormat.INT8: GROUP_INPUTS,
    WeightFormat.INT4: GROUP_INPUTS,
}


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Shapes and dtypes of a ``[num_out, num_in]`` weight in a format."""

    format: WeightFormat
    num_out: int
    num_in: int

    @property
    def num_tiles(self) -> int:
        return -(-self.num_out // TILE_OUTPUTS)

    @property
    def padded_in(self) -> int:
        multiple = _INPUT_MULTIPLES[self.format]
        return -(-self.num_in // multiple) * multiple

    @property
    def num_groups(self) -> int:
        return self.padded_in // GROUP_INPUTS

    @property
    def data(self) -> tuple[tuple[int, ...], torch.dtype]:
        tiles, words = self.num_tiles, self.padded_in // self.format.inputs_per_word
        match self.format:
            case WeightFormat.FLOAT32:
                return (tiles, words, TILE_OUTPUTS), torch.float32
            case WeightFormat.BFLOAT16:
                return (tiles, words, TILE_OUTPUTS, 2), torch.bfloat16
            case WeightFormat.INT8:
                return (tiles, words, TILE_OUTPUTS, 4), torch.uint8
            case WeightFormat.INT4:
                return (tiles, self.num_groups, 8, TILE_OUTPUTS, 4), torch.uint8

    @property
    def scales(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        match self.format:
            case WeightFormat.INT8:
                return (self.num_tiles * TILE_OUTPUTS,), torch.float32
            case WeightFormat.INT4:
                return (self.num_tiles, self.num_groups, TILE_OUTPUTS), torch.bfloat16
            case _:
                return None

    @property
    def nbytes(self) -> int:
        parts = (self.data, self.scales)
        return sum(math.prod(part[0]) * part[1].itemsize for part in parts if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A ``[num_out, num_in]`` weight; module docstring for ``data`` and ``scales``, which are on one device."""

    format: WeightFormat
    num_out: int
    num_in: int
    data: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def empty(
        cls, format: WeightFormat, num_out: int, num_in: int, allocate: Allocate | None = None
    ) -> PackedWeight:
        """Room for a weight, its content undefined; ``allocate`` gives aligned memory, by default of its own."""
        layout = PackedLayout(format, num_out, num_in)
        make = allocate or _allocate
        scales = None if layout.scales is None else make(*layout.scales)
        return cls(format, num_out, num_in, make(*layout.data), scales)

    def to(self, device: torch.device) -> PackedWeight:
        """The weight on ``device``, a copy unless it is there."""
        scales = None if self.scales is None else self.scales.to(device)
        return PackedWeight(self.format, self.num_out, self.num_in, self.data.to(device), scales)

    def outputs(self, first: int, end: int) -> PackedWeight:
        """These outputs, whole tiles but for the last, as a view. ValueError for others."""
        is_whole = first % TILE_OUTPUTS == 0 and (end % TILE_OUTPUTS == 0 or end == self.num_out)
        if not (is_whole and 0 <= first < end <= self.num_out):
            raise ValueError(f"outputs {first} to {end} of {self.num_out} are not tiles of {TILE_OUTPUTS}")
        tiles, scales = slice(first // TILE_OUTPUTS, -(-end // TILE_OUTPUTS)), self.scales
        if scales is not None:
            is_flat = self.format is WeightFormat.INT8
            scales = scales[first : tiles.stop * TILE_OUTPUTS] if is_flat else scales[tiles]
        return PackedWeight(self.format, end - first, self.num_in, self.data[tiles], scales)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(self.format, self.num_out, self.num_in)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def words(self) -> torch.Tensor:
        """The data as int32 ``[tiles, words, 16]``, a view."""
        return self.data.view(torch.int32).view(self.data.shape[0], -1, TILE_OUTPUTS)

    def tile_chunks(self, max_values: int) -> Iterator[slice]:
        """All tiles in chunks of at most so many values, or of one tile."""
        layout = self.layout
        tiles = max(1, max_values // (TILE_OUTPUTS * layout.padded_in))
        for start in range(0, layout.num_tiles, tiles):
            yield slice(start, min(start + tiles, layout.num_tiles))

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[num_out, num_in]`` as a new tensor, row-major; rows may be longer in memory."""
        rows = self._room(self.layout.num_tiles, dtype)
        self._unpack_to(rows)
        return rows[: self.num_out, : self.num_in]

    def unpack_parts(self, dtype: torch.dtype, max_values: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some outputs after the other, as ``tile_chunks`` cuts them, and their weights ``[n, num_in]``.

        They are in the same memory, each until the next is asked for: it stays in a cache, and takes little.
        """
        room: torch.Tensor | None = None
        for tiles in self.tile_chunks(max_values):
            first, end = tiles.start * TILE_OUTPUTS, min(tiles.stop * TILE_OUTPUTS, self.num_out)
            if room is None:  # the first is the largest
                room = self._room(tiles.stop - tiles.start, dtype)
            part = self.outputs(first, end)
            part._unpack_to(room[: part.layout.num_tiles * TILE_OUTPUTS])
            yield slice(first, end), room[: end - first, : self.num_in]

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows ``[*indices.shape, num_in]`` of a floating-point format, in its dtype, a copy.

        IndexError for an index outside 0..num_out - 1, ValueError for a quantized format.
        """
        if self.scales is not None:
            raise ValueError(f"rows of {self.format.value} weights are not read one by one")
        # One by one: for a token or two torch's indexing by tensors takes longer than the copy.
        wanted = indices.flatten().tolist()
        words = self.words.new_empty(len(wanted), self.words.shape[1])
        for row, index in enumerate(wanted):
            if not 0 <= index < self.num_out:
                raise IndexError(f"row {index}: there are {self.num_out}")
            words[row] = self.words[index // TILE_OUTPUTS, :, index % TILE_OUTPUTS]
        return words.view(self.data.dtype)[:, : self.num_in].reshape(*indices.shape, self.num_in)

    def _room(self, num_tiles: int, dtype: torch.dtype) -> torch.Tensor:
        """For the rows of so many tiles."""
        shape = (num_tiles * TILE_OUTPUTS, self.layout.padded_in)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _unpack_to(self, rows: torch.Tensor) -> None:
        """All tiles to rows of their own, one after the other."""
        if self.device.type == "cpu" and rows.dtype in _NATIVE_DTYPES:
            num_threads = torch.get_num_threads()
            _C.unpack_weight(native_weight(self), _NATIVE_DTYPES[rows.dtype], rows.data_ptr(), num_threads)
            return
        for tiles in self.tile_chunks(_UNPACKED_AT_ONCE):
            rows[tiles.start * TILE_OUTPUTS : tiles.stop * TILE_OUTPUTS] = self._values(tiles)

    def _values(self, tiles: slice) -> torch.Tensor:
        """These tiles as rows ``[16 * tiles, padded_in]``, in float32 or the data's own float dtype."""
        stored = self.words[tiles].transpose(1, 2).contiguous().flatten(0, 1).view(self.data.dtype)
        if self.scales is None:
            return stored
        if self.format is WeightFormat.INT8:
            scales = self.scales[tiles.start * TILE_OUTPUTS : tiles.stop * TILE_OUTPUTS, None]
            return stored.float().sub_(INT8_ZERO).mul_(scales)
        num_groups = self.layout.num_groups
        values = unpack_nibbles(stored).view(-1, num_groups, GROUP_INPUTS).float().sub_(INT4_ZERO)
        scales = self.scales[tiles].transpose(1, 2).reshape(-1, num_groups, 1)
        return values.mul_(scales).flatten(1)


def native_weight(weight: PackedWeight) -> _C.PackedWeight:
    """The C++ view of a weight on the CPU, which must outlive it."""
    scales = _NO_TENSOR if weight.scales is None else weight.scales.data_ptr()
    return _C.PackedWeight(weight.format.value, weight.num_out, weight.num_in, weight.data.data_ptr(), scales)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes ``[R, K/2]`` to uint8 ``[R, K]`` below 16: inputs 4 apart share a byte."""
    words = packed.view(len(packed), -1, 4)
    return torch.stack((words & 15, words >> 4), dim=2).flatten(1)


def _allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return memory.empty(shape, dtype, torch.device("cpu"))
