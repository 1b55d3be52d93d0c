"""Weights of 8 bits with a scale for each block of rows and columns, as some checkpoints have them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from petalsd.errors import UnsupportedModel
from petalsd.models.hf.parts import Part, RowsPart, Shape, Stored, check_unpacked
from petalsd.ops.staging import Copy

FP8 = "fp8"
_STORED = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Fp8Part:
    """As ``rows``, of weights ``[num_out, num_in]`` with ``<name>_scale_inv`` beside them.

    block  rows and columns that share a scale
    """

    rows: RowsPart
    block: tuple[int, int]

    @property
    def stored(self) -> Mapping[str, Shape]:
        scales = tuple(math.ceil(size / step) for size, step in zip(self.rows.shape, self.block, strict=True))
        return {**self.rows.stored, **{scale_name(name): scales for name in self.rows.names}}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self.rows.names, _STORED)

    @property
    def pieces(self) -> list[Shape]:
        return self.rows.pieces

    def copy_to(self, whole: torch.Tensor, stored: Stored, copy: Copy) -> None:
        self.rows.copy_to(whole, lambda name: self._unpack(name, stored), copy)

    def _unpack(self, name: str, stored: Stored) -> torch.Tensor:
        """Float32: the products are rounded once more where less is served in."""
        weight, scales = stored(name).float(), stored(scale_name(name)).float()
        for axis, step in enumerate(self.block):
            scales = scales.repeat_interleave(step, axis).narrow(axis, 0, weight.shape[axis])
        weight *= scales
        check_unpacked(name, weight)
        return weight


def with_scales(part: Part, hf: Any, names: Collection[str]) -> Part:
    """The part as a checkpoint in this format has it, where ``names``, its tensors, have scales for it.

    UnsupportedModel when transformers' config means another way to scale.
    """
    quantization = getattr(hf, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != FP8:
        return part
    block = _block(quantization)
    has_scales = isinstance(part, RowsPart) and all(scale_name(name) in names for name in part.names)
    return Fp8Part(part, block) if isinstance(part, RowsPart) and has_scales else part


def scale_name(name: str) -> str:
    return f"{name}_scale_inv"


def _block(quantization: Mapping[str, Any]) -> tuple[int, int]:
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise UnsupportedModel(
            f"quantization_config.weight_block_size = {block!r}: FP8 weights are read with a scale for each block "
            "of rows and columns, as [128, 128]"
        )
    return block[0], block[1]
