"""Keys and values of 8 bits in the order of the GPU kernels: token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from petalsd.ops.kv_rounding import quantize_states
from petalsd.ops.memory import empty
from petalsd.ops.ragged import PagedKV

FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = torch.finfo(FLOAT8).max
_FLOAT8_CAPABILITY = (8, 9)


@dataclass(slots=True)
class Int8KV(PagedKV):
    """The KV slab in int8; symbols as in ``ops.ragged``.

    k, v                ``[N, P, Hkv, D]`` int8
    k_scales, v_scales  ``[N, P, Hkv]`` float32; an element is ``q * scale``, q in -127..127
    dtype               what the blocks compute in
    """

    k_scales: torch.Tensor
    v_scales: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def allocate(cls, pages: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Int8KV:
        """Pages ``(N, P, Hkv, D)`` of undefined content."""
        k, v = (empty(pages, torch.int8, device) for _ in range(2))
        k_scales, v_scales = (empty(pages[:3], torch.float32, device) for _ in range(2))
        return cls(k, v, k_scales, v_scales, dtype)

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        return self.k, self.v, self.k_scales, self.v_scales

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for states, slab, scales in ((k, self.k, self.k_scales), (v, self.v, self.v_scales)):
            rounded, factors = quantize_states(states)
            slab.flatten(0, 1).index_copy_(0, slots, rounded)
            scales.flatten(0, 1).index_copy_(0, slots, factors)

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (
            slab.flatten(0, 1).index_select(0, slots)
            * scales.flatten(0, 1).index_select(0, slots).unsqueeze(-1)
            for slab, scales in ((self.k, self.k_scales), (self.v, self.v_scales))
        )
        return k.to(self.dtype), v.to(self.dtype)


@dataclass(slots=True)
class Float8KV(PagedKV):
    """The KV slab in float8 without scales: what lies beyond its range becomes its greatest value.

    k, v   ``[N, P, Hkv, D]`` float8_e4m3fn
    dtype  what the blocks compute in
    """

    dtype: torch.dtype

    @classmethod
    def allocate(cls, pages: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Float8KV:
        """Pages ``(N, P, Hkv, D)`` of undefined content."""
        k, v = (empty(pages, FLOAT8, device) for _ in range(2))
        return cls(k, v, dtype)

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """As bytes: torch copies no rows of float8 on every device."""
        return self.k.view(torch.uint8), self.v.view(torch.uint8)

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for states, slab in zip((k, v), self.slabs, strict=True):
            rounded = states.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(FLOAT8)
            slab.flatten(0, 1).index_copy_(0, slots, rounded.view(torch.uint8))

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (slab.flatten(0, 1).index_select(0, slots).view(FLOAT8).to(self.dtype) for slab in self.slabs)
        return k, v


EIGHT_BIT_KV: Mapping[torch.dtype, type[Int8KV | Float8KV]] = {torch.int8: Int8KV, FLOAT8: Float8KV}
"""The slabs of 8 bits by the dtype of their elements."""


def check_float8(device: torch.device) -> None:
    """ValueError where there are no instructions for pages in float8."""
    needed = ".".join(map(str, _FLOAT8_CAPABILITY))
    if device.type != "cuda":
        raise ValueError(
            f"float8 pages need a GPU of compute capability {needed}, not the {device.type.upper()}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLOAT8_CAPABILITY:
        found = ".".join(map(str, capability))
        raise ValueError(f"float8 pages need compute capability {needed}, {device} has {found}")
