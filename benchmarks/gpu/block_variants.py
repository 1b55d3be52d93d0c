"""Variants of the small kernels of a block: norms, rotation with KV write, gated activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.gpu.variants import FLOAT8_TARGETS, MODELS, TARGETS, Limits, Shape, Variant, meta
from petalsd.ops.add_norm import add_norm
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.expert_gate import ClampedGate
from petalsd.ops.gated_activation import ACTIVATIONS, clamped_activation, gated_activation
from petalsd.ops.norm import Norm
from petalsd.ops.ragged import PagedKV
from petalsd.ops.rope_kv import HeadNorms, Rotation, rope_and_write

_TOKENS = 8
_PAGES, _PAGE_TOKENS, _POSITIONS = 1024, 16, 4096


def variants(shapes: Iterable[Shape]) -> Iterator[Variant]:
    for shape in shapes:
        yield from _variants_of(shape)
    yield Variant("add_norm 16384", partial(_norm, 16384), Limits())
    yield Variant("norm 4096", partial(_norm, 4096, has_x=False), Limits())
    yield _rope_variant(MODELS["Qwen3-8B"])
    # What other families than the fused ones have.
    for width in (64, 128):
        yield Variant(f"norm {width}", partial(_norm, width, has_x=False), Limits())
    for width in (256, 5376):
        yield Variant(f"norm {width}, Gemma", partial(_norm, width, has_x=False, offset=1.0), Limits())
    yield Variant("add_norm 2048, Gemma", partial(_norm, 2048, offset=1.0), Limits())
    yield Variant("add_layer_norm 4096", partial(_norm, 4096, is_layer_norm=True), Limits())
    for activation in sorted(set(ACTIVATIONS) - {"silu", "swish"}):
        yield Variant(f"{activation} 14336", partial(_activation, 14336, activation), Limits())
    yield Variant("clamped swish 2880", partial(_clamped, 2880), Limits())
    yield Variant(
        "rope_kv 32/8x128, interleaved", partial(_rope, 32, 8, 128, 128, is_interleaved=True), Limits()
    )
    yield Variant("rope_kv 32/32x80, 32 of 80 rotated", partial(_rope, 32, 32, 80, 32), Limits())
    for name, stored, targets in (("int8", Int8KV, TARGETS), ("float8", Float8KV, FLOAT8_TARGETS)):
        eight_bit = partial(_rope, 32, 8, 128, 128, stored=stored)
        yield Variant(f"rope_kv 32/8x128, {name} pages", eight_bit, Limits(), targets)
    yield Variant("rope_kv 32/8x128, no rotation", partial(_rope, 32, 8, 128, 0), Limits())


def _variants_of(shape: Shape) -> Iterator[Variant]:
    yield Variant(f"add_norm {shape.hidden}", partial(_norm, shape.hidden), Limits())
    yield Variant(f"silu {shape.intermediate}", partial(_activation, shape.intermediate, "silu"), Limits())
    yield _rope_variant(shape)


def _rope_variant(shape: Shape) -> Variant:
    name = f"rope_kv {shape.heads}/{shape.kv_heads}x{shape.head_dim}"
    call = partial(_rope, shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim)
    if not shape.has_head_norms:
        return Variant(name, call, Limits())
    return Variant(f"{name}, head norms", partial(call, has_norms=True), Limits(registers=80))


@dataclass
class Places:
    """``rope_kv.WritePlaces`` without memory."""

    positions: torch.Tensor = field(default_factory=lambda: meta(_TOKENS, dtype=torch.int32))
    write_origins: torch.Tensor = field(default_factory=lambda: meta(_TOKENS, dtype=torch.int32))
    write_offsets: torch.Tensor = field(default_factory=lambda: meta(_TOKENS, dtype=torch.int32))


def _norm(width: int, has_x: bool = True, offset: float = 0.0, is_layer_norm: bool = False) -> None:
    hidden = meta(_TOKENS, width)
    norm = Norm(meta(width), 1e-5, offset, meta(width) if is_layer_norm else None, is_layer_norm)
    add_norm(hidden if has_x else None, hidden, norm, hidden)


def _clamped(width: int) -> None:
    clamped_activation(meta(_TOKENS, 2 * width), meta(_TOKENS, width), ClampedGate(7.0, 1.702))


def _activation(width: int, activation: str) -> None:
    gated_activation(meta(_TOKENS, 2 * width), meta(_TOKENS, width), activation)


def _rope(
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    *,
    is_interleaved: bool = False,
    has_norms: bool = False,
    stored: type[Int8KV | Float8KV] | None = None,
) -> None:
    shape = (_PAGES, _PAGE_TOKENS, kv_heads, head_dim)
    if stored is None:
        kv = PagedKV(meta(*shape), meta(*shape))
    else:
        kv = stored.allocate(shape, torch.bfloat16, torch.device("meta"))
    rotation = None
    if rotary:
        angles = meta(_POSITIONS, 2, rotary // 2, dtype=torch.float32)
        rotation = Rotation(angles, is_interleaved=is_interleaved)
    norms = HeadNorms(meta(head_dim), meta(head_dim), 1e-6) if has_norms else None
    qkv, q = meta(_TOKENS, (heads + 2 * kv_heads) * head_dim), meta(_TOKENS, heads, head_dim)
    rope_and_write(qkv, q, kv, Places(), 3, rotation, norms)
