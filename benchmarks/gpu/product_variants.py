"""Variants of products of few rows, and of those by expert: all tiles, split and not. Sizes are arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.variants import Limits, Matrix, Variant, meta
from petalsd.ops import dense_linear, expert_linear, quantized_linear
from petalsd.ops.expert_order import order_experts, sum_experts
from petalsd.ops.launching import record_launches
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.split_workspace import SplitWorkspace

_NUM_OUT, _NUM_IN = 4096, 14336
_MANY_MULTIPROCESSORS = 128  # so that products of few rows are split
# By rows of a tile. Two warps are too few for the instructions of warp groups.
_FEW_LIMITS = {
    8: Limits(96, Matrix.FEW_ROWS, is_async=True),
    16: Limits(128, Matrix.FEW_ROWS, is_async=True),
}
_MANY_LIMITS = Limits(255, Matrix.MANY_ROWS, is_async=True)
_QUANTIZED_LIMITS = {
    WeightFormat.INT8: {**_FEW_LIMITS, 32: Limits(232, Matrix.FEW_ROWS, is_async=True), 64: _MANY_LIMITS},
    WeightFormat.INT4: {**_FEW_LIMITS, 32: Limits(168, Matrix.MANY_ROWS, is_async=True), 64: _MANY_LIMITS},
}
_DENSE_LIMITS = {rows: Limits(128, Matrix.MANY_ROWS, is_async=True) for rows in (16, 32)}
# Exact, so by no matrix instructions.
_FLOAT32_LIMITS = Limits(255, Matrix.NONE, is_async=True)
_UNPACKING_LIMITS = Limits(128, Matrix.NONE)
_SCALE_COPIES = {WeightFormat.INT8: 0, WeightFormat.INT4: 8}  # which come in pairs of 4 bytes
_EXPERTS, _TOP_K = 8, 2
_EXPERTS_IN, _EXPERTS_OUT = 4096, 2048
_BIASED_IN = _BIASED_OUT = 2880  # gpt-oss's, which fill neither pieces nor tiles


def variants() -> Iterator[Variant]:
    yield from _of_one_weight()
    yield from _of_experts()


def _of_one_weight() -> Iterator[Variant]:
    for rows, limits in _DENSE_LIMITS.items():
        yield Variant(f"dense product, {rows} rows, split", partial(_dense, rows, True), limits)
    yield Variant(
        "dense product, 16 rows, bias", partial(_dense, 16, False, has_bias=True), _DENSE_LIMITS[16]
    )
    for format, scale_copies in _SCALE_COPIES.items():
        for rows, limits in _QUANTIZED_LIMITS[format].items():
            allowed = replace(limits, narrow_copies=scale_copies)
            yield Variant(
                f"{format} product, {rows} rows, split", partial(_quantized, format, rows, True), allowed
            )
        whole = partial(_quantized, format, 16, False, has_bias=True)
        allowed = replace(_FEW_LIMITS[16], narrow_copies=scale_copies)
        yield Variant(f"{format} product, 16 rows, bias", whole, allowed)
        exact = partial(_quantized, format, 16, True, dtype=torch.float32)
        yield Variant(
            f"{format} product, float32", exact, replace(_FLOAT32_LIMITS, narrow_copies=scale_copies)
        )
        many = partial(_quantized, format, quantized_linear.MAX_ROWS + 1, False)
        yield Variant(f"{format} unpacked", many, _UNPACKING_LIMITS)


def _of_experts() -> Iterator[Variant]:
    """By the tokens of a step."""
    for tokens, is_split in zip(expert_linear.BLOCK_ROWS, (True, False), strict=True):
        name = f"{tokens} rows{', split' if is_split else ''}"
        limits = _DENSE_LIMITS[tokens]
        yield Variant(f"experts' dense product, {name}", partial(_experts, None, tokens, is_split), limits)
        biased = partial(_experts, None, tokens, is_split, has_bias=True)
        yield Variant(f"experts' dense product, {name}, bias", biased, limits)
        for format, scale_copies in _SCALE_COPIES.items():
            limits = replace(_QUANTIZED_LIMITS[format][tokens], narrow_copies=scale_copies)
            yield Variant(
                f"experts' {format} product, {name}", partial(_experts, format, tokens, is_split), limits
            )
            biased = partial(_experts, format, tokens, is_split, has_bias=True)
            yield Variant(f"experts' {format} product, {name}, bias", biased, limits)
    exact = partial(_experts, None, 16, True, dtype=torch.float32)
    yield Variant("experts' dense product, float32", exact, _FLOAT32_LIMITS)
    yield Variant("experts in order", _order, Limits())
    yield Variant("experts' sum", _sum, Limits())


def _dense(rows: int, is_split: bool, *, has_bias: bool = False) -> None:
    bias = meta(_NUM_OUT) if has_bias else None
    x, out = meta(rows, _NUM_IN), meta(rows, _NUM_OUT)
    dense_linear.dense_linear(x, meta(_NUM_OUT, _NUM_IN), bias, out, _workspace(is_split))


def _quantized(
    format: WeightFormat,
    rows: int,
    is_split: bool,
    *,
    has_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    weight = _packed(format, _NUM_OUT, _NUM_IN)
    bias = meta(_NUM_OUT) if has_bias else None
    x, out = meta(rows, _NUM_IN, dtype=dtype), meta(rows, _NUM_OUT, dtype=dtype)
    quantized_linear.quantized_linear(x, weight, bias, out, _workspace(is_split))


def _workspace(is_split: bool) -> SplitWorkspace:
    return SplitWorkspace.allocate(torch.device("meta"), _MANY_MULTIPROCESSORS if is_split else 1)


def _experts(
    format: WeightFormat | None,
    tokens: int,
    is_split: bool,
    *,
    has_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    with record_launches():  # the order is a variant of its own
        order = order_experts(
            meta(tokens, _TOP_K, dtype=torch.int64), _EXPERTS, expert_linear.block_rows(tokens, dtype)
        )
    num_in, num_out = (_BIASED_IN, _BIASED_OUT) if has_bias else (_EXPERTS_IN, _EXPERTS_OUT)
    x, out = meta(tokens, num_in, dtype=dtype), meta(tokens * _TOP_K, num_out, dtype=dtype)
    # Beside packed weights biases stay in float32.
    bias_dtype = dtype if format is None else torch.float32
    bias = meta(_EXPERTS, num_out, dtype=bias_dtype) if has_bias else None
    if format is None:
        weight = meta(_EXPERTS, num_out, num_in, dtype=dtype)
        expert_linear.expert_linear(x, weight, bias, order, out, _workspace(is_split))
    else:
        packed = _packed(format, _EXPERTS * num_out, num_in)
        expert_linear.quantized_expert_linear(x, packed, bias, order, out, _workspace(is_split))


def _order() -> None:
    """Of as many experts as most models of this kind have."""
    order_experts(meta(64, 8, dtype=torch.int64), 128, 32)


def _sum() -> None:
    sum_experts(meta(64 * 8, 2048), meta(64, 8), meta(64, 2048))


def _packed(format: WeightFormat, num_out: int, num_in: int) -> PackedWeight:
    return PackedWeight.empty(format, num_out, num_in, lambda shape, dtype: meta(*shape, dtype=dtype))
