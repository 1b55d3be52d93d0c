"""What a tensor of a layer is put together from, out of those of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, TypeAlias

import torch

from petalsd.errors import WeightsError
from petalsd.ops.mxfp4 import BYTES_PER_BLOCK, VALUES_PER_BLOCK, unpack_mxfp4
from petalsd.ops.staging import Copy

Shape: TypeAlias = tuple[int, ...]
Stored: TypeAlias = Callable[[str], torch.Tensor]
"""A tensor of a checkpoint by name."""


class RowOrder(Enum):
    """How the rows ``[num_out, num_in]`` of a layer's tensor lie in a file.

    SAME        as in the layer
    BY_TURNS    those of the upper half take turns with those of the lower half, as of a gate and the up below it
    TRANSPOSED  the layer has them as columns
    """

    SAME = auto()
    BY_TURNS = auto()
    TRANSPOSED = auto()

    def arrange(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows, or one number for each, of a file as the layer has them."""
        if self is RowOrder.BY_TURNS:
            return torch.cat([rows[::2], rows[1::2]])
        return rows.t() if self is RowOrder.TRANSPOSED else rows


class Part(Protocol):
    """A part of one tensor of a layer, or all of it."""

    @property
    def stored(self) -> Mapping[str, Shape]:
        """The tensors of the checkpoint that it is read from."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Of those that are not numbers themselves."""

    @property
    def pieces(self) -> list[Shape]:
        """Shapes of the weights that it is, each expert's apart."""

    def copy_to(self, whole: torch.Tensor, stored: Stored, copy: Copy) -> None:
        """Fill its place in ``whole``, the layer's tensor. Raises WeightsError."""


@dataclass(frozen=True, slots=True)
class RowsPart:
    """Tensors of one shape, one below the other at place ``at`` of the layer's tensor; None: one is all of it."""

    names: tuple[str, ...]
    shape: Shape
    at: int | None = None

    @property
    def stored(self) -> Mapping[str, Shape]:
        return dict.fromkeys(self.names, self.shape)

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {}

    @property
    def pieces(self) -> list[Shape]:
        if len(self.shape) == 3:
            experts, *matrix = self.shape
            return [tuple(matrix)] * experts
        return [self.shape] * len(self.names)

    def copy_to(self, whole: torch.Tensor, stored: Stored, copy: Copy) -> None:
        if self.at is None:
            copy(whole, stored(self.names[0]))
            return
        place, rows = whole[self.at], self.shape[0]
        for number, name in enumerate(self.names):
            copy(place[number * rows : (number + 1) * rows], stored(name))


@dataclass(frozen=True, slots=True)
class SlicePart:
    """Place ``at`` of the layer's tensor is that of the file's, ``shape``; matrices are transposed."""

    name: str
    shape: Shape
    at: int
    order: RowOrder

    @property
    def stored(self) -> Mapping[str, Shape]:
        return {self.name: self.shape}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {}

    @property
    def pieces(self) -> list[Shape]:
        return [self.shape[:0:-1]]

    def copy_to(self, whole: torch.Tensor, stored: Stored, copy: Copy) -> None:
        # Transposed first: torch is slow to do that together with a cast, or to every other column.
        rows = stored(self.name)[self.at].t().contiguous()
        copy(whole[self.at], self.order.arrange(rows))


@dataclass(frozen=True, slots=True)
class Mxfp4Part:
    """Place ``at`` of the layer's tensor, a weight in MXFP4: ``<name>_blocks`` and ``<name>_scales``.

    shape  what these unpack to, ``[experts, num_out, num_in]``
    """

    name: str
    shape: tuple[int, int, int]
    at: int
    order: RowOrder

    @property
    def stored(self) -> Mapping[str, Shape]:
        num_experts, num_out, num_in = self.shape
        groups = (num_experts, num_out, num_in // VALUES_PER_BLOCK)
        return {f"{self.name}_blocks": (*groups, BYTES_PER_BLOCK), f"{self.name}_scales": groups}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self.stored, torch.uint8)

    @property
    def pieces(self) -> list[Shape]:
        return [self.shape[1:]]

    def copy_to(self, whole: torch.Tensor, stored: Stored, copy: Copy) -> None:
        blocks, scales = (stored(name)[self.at] for name in self.stored)
        weight = unpack_mxfp4(blocks, scales)
        check_unpacked(f"{self.name}_scales", weight)
        copy(whole[self.at], self.order.arrange(weight))


def check_unpacked(name: str, weight: torch.Tensor) -> None:
    """WeightsError that names the packed tensor when a value that it stands for is not finite."""
    if not all(math.isfinite(extreme) for extreme in weight.aminmax()):
        raise WeightsError(
            f"{name} makes values that are not finite", hint="the checkpoint is damaged: use another revision"
        )
