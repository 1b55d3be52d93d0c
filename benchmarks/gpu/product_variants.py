"""Variants of products over packed weights: all tiles, split and not. Sizes are arguments of these kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.variants import Limits, Matrix, Variant, meta
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.quantized_linear import MAX_ROWS, SplitWorkspace, quantized_linear

_NUM_OUT, _NUM_IN = 4096, 14336
_MANY_MULTIPROCESSORS = 128  # so that products of few rows are split
# By rows of a tile; the scales of int4 come in pairs of 4 bytes.
_LIMITS = {
    16: Limits(128, Matrix.FEW_ROWS, is_async=True),
    32: Limits(168, Matrix.FEW_ROWS, is_async=True),
    64: Limits(168, Matrix.MANY_ROWS, is_async=True),
}
# Exact, so by no matrix instructions.
_FLOAT32_LIMITS = Limits(255, Matrix.NONE, is_async=True)
_UNPACKING_LIMITS = Limits(128, Matrix.NONE)
_SCALE_COPIES = {WeightFormat.INT8: 0, WeightFormat.INT4: 8}


def variants() -> Iterator[Variant]:
    for format, scale_copies in _SCALE_COPIES.items():
        for rows, limits in _LIMITS.items():
            if rows > 32 and format is WeightFormat.INT4:
                continue  # as two tiles of 32
            allowed = replace(limits, narrow_copies=scale_copies)
            yield Variant(
                f"{format} product, {rows} rows, split", partial(_product, format, rows, True), allowed
            )
        whole = partial(_product, format, 16, False, has_bias=True)
        yield Variant(
            f"{format} product, 16 rows, bias", whole, replace(_LIMITS[16], narrow_copies=scale_copies)
        )
        exact = partial(_product, format, 16, True, dtype=torch.float32)
        yield Variant(
            f"{format} product, float32", exact, replace(_FLOAT32_LIMITS, narrow_copies=scale_copies)
        )
        yield Variant(f"{format} unpacked", partial(_product, format, MAX_ROWS + 1, False), _UNPACKING_LIMITS)


def _product(
    format: WeightFormat,
    rows: int,
    is_split: bool,
    *,
    has_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    here = torch.device("meta")
    weight = PackedWeight.empty(format, _NUM_OUT, _NUM_IN, lambda shape, dtype: meta(*shape, dtype=dtype))
    workspace = SplitWorkspace.allocate(here, _MANY_MULTIPROCESSORS if is_split else 1)
    bias = meta(_NUM_OUT) if has_bias else None
    x, out = meta(rows, _NUM_IN, dtype=dtype), meta(rows, _NUM_OUT, dtype=dtype)
    quantized_linear(x, weight, bias, out, workspace)
