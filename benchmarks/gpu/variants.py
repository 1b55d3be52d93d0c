"""Which kernels a supported model can ask for, and what their code must not exceed: one list for all of them.

Each variant calls a launcher on tensors of the device "meta", in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from benchmarks.gpu.sass import Figures

TARGETS = (80, 86, 89, 90, 100)
FLOAT8_TARGETS = tuple(target for target in TARGETS if target >= 89)
"""Those that can read pages in float8."""

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""What a program may have of a multiprocessor's shared memory."""


class Matrix(Enum):
    """Which matrix instructions a kernel must have on sm_90 and on sm_100; below them it is HMMA, or none."""

    NONE = ("", "")
    FEW_ROWS = ("HMMA.BF16", "HMMA.BF16")  # too few for the instructions of warp groups
    MANY_ROWS = ("HGMMA.BF16", "UTCHMMA")

    def expected(self, target: int) -> str:
        below_90, on_90, on_100 = ("HMMA.BF16" if self.value[0] else ""), *self.value
        return {90: on_90, 100: on_100}.get(target, below_90)


@dataclass(frozen=True, slots=True)
class Limits:
    """No spill and no stack ever; beside that:

    registers      of a thread, at most
    matrix         all matrix instructions are of this kind
    is_async       has asynchronous copies of 16 bytes
    narrow_copies  how many asynchronous copies of less than 8 bytes it may have
    """

    registers: int = 64
    matrix: Matrix = Matrix.NONE
    is_async: bool = False
    narrow_copies: int = 0

    def violations(self, figures: Figures, target: int) -> list[str]:
        expected = self.matrix.expected(target)
        checks = {
            f"{figures.registers} registers, {self.registers} are allowed": (
                figures.registers <= self.registers
            ),
            f"{figures.spills} loads and stores of spilled registers": figures.spills == 0,
            f"{figures.stack_bytes} bytes of stack": figures.stack_bytes == 0,
            f"{figures.shared_bytes} bytes of shared memory, {SHARED_BYTES[target]} are there": (
                figures.shared_bytes <= SHARED_BYTES[target]
            ),
            f"matrix instructions {figures.matrix}, expected {expected or 'none'}": (
                set(figures.matrix) == ({expected} if expected else set())
            ),
            "no asynchronous copies of 16 bytes": figures.async_wide_loads > 0 or not self.is_async,
            f"{figures.async_narrow_loads} asynchronous copies of less than 8 bytes": (
                figures.async_narrow_loads <= self.narrow_copies
            ),
        }
        return [problem for problem, is_met in checks.items() if not is_met]


@dataclass(frozen=True, slots=True)
class Variant:
    """``call`` launches on tensors without memory; ``targets`` are those that it is served on."""

    name: str
    call: Callable[[], None]
    limits: Limits
    targets: tuple[int, ...] = TARGETS


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's blocks: hidden and intermediate size, heads, KV heads, head size; Qwen3 has norms of heads."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    has_head_norms: bool = False


MODELS = {
    "SmolLM2-135M": Shape(576, 1536, 9, 3, 64),
    "TinyLlama-1.1B": Shape(2048, 5632, 32, 4, 64),
    "Llama-3.2-1B": Shape(2048, 8192, 32, 8, 64),
    "Llama-3.2-3B": Shape(3072, 8192, 24, 8, 128),
    "Llama-2-7B": Shape(4096, 11008, 32, 32, 128),
    "Llama-2-13B": Shape(5120, 13824, 40, 40, 128),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 8, 128),
    "Llama-3.1-70B": Shape(8192, 28672, 64, 8, 128),
    "Llama-3.1-405B": Shape(16384, 53248, 128, 8, 128),
    "Mistral-7B": Shape(4096, 14336, 32, 8, 128),
    "Mistral-Nemo-12B": Shape(5120, 14336, 32, 8, 128),
    "Mistral-Large-123B": Shape(12288, 28672, 96, 8, 128),
    "Qwen2.5-0.5B": Shape(896, 4864, 14, 2, 64),
    "Qwen2.5-1.5B": Shape(1536, 8960, 12, 2, 128),
    "Qwen2.5-7B": Shape(3584, 18944, 28, 4, 128),
    "Qwen2.5-32B": Shape(5120, 27648, 40, 8, 128),
    "Qwen2.5-72B": Shape(8192, 29568, 64, 8, 128),
    "Qwen3-0.6B": Shape(1024, 3072, 16, 8, 128, True),
    "Qwen3-8B": Shape(4096, 12288, 32, 8, 128, True),
    "Qwen3-32B": Shape(5120, 25600, 64, 8, 128, True),
}
# Those that the tests compile beside single variants of others: small kernels hardly depend on the model.
TESTED_MODELS = ("SmolLM2-135M", "Llama-3.1-8B")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def all_variants(is_full: bool = False) -> dict[str, Variant]:
    """By name; with ``is_full`` those of all models."""
    from benchmarks.gpu import attention_variants, block_variants, product_variants

    shapes = list(MODELS.values()) if is_full else [MODELS[name] for name in TESTED_MODELS]

    def found() -> Iterator[Variant]:
        yield from block_variants.variants(shapes)
        yield from product_variants.variants()
        yield from attention_variants.variants(is_full)

    return {variant.name: variant for variant in found()}
