"""Keys and values in the order in which the CPU kernels read them: each KV head's part of a page in one piece.

Within a page the elements of a key (or of the values of a few tokens) that a processor multiplies at once lie side
by side, ``pair`` of them: 2 for bfloat16, else 1. The lanes of a register are then tokens when scores are computed
and dimensions when values are added up, and nothing is summed across a register.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from petalsd import _C
from petalsd.ops.kv_rounding import quantize_states
from petalsd.ops.memory import empty
from petalsd.ops.ragged import PagedKV

STRIP_TOKENS = 16
"""Tokens whose keys lie side by side; a page holds a multiple of them."""

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_PAIRS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 1}


@dataclass(slots=True)
class HeadMajorKV(PagedKV):
    """The KV slab in another order; symbols as in ``ops.ragged``.

    k         ``[N, Hkv, P / 16, D / pair, 16, pair]``: float32, bfloat16 or int8
    v         ``[N, Hkv, P / pair, D, pair]``, likewise
    k_scales, v_scales
              of int8 only: float32 ``[N, Hkv, P]``; a token's element in a head is ``q * scale``, q in -127..127
    dtype     what the blocks compute in
    native    the same memory as the C++ code sees it
    """

    dtype: torch.dtype
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None
    native: _C.KVPages = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = (self.k, self.v, self.k_scales, self.v_scales)
        addresses = [0 if part is None else part.data_ptr() for part in parts]
        self.native = _C.KVPages(
            _KINDS[self.k.dtype], addresses, self.page_tokens, self.k.shape[1], self.v.shape[3]
        )

    @classmethod
    def allocate(
        cls,
        pages: tuple[int, int, int, int],
        dtype: torch.dtype,
        stored: torch.dtype | None = None,
    ) -> HeadMajorKV:
        """Pages ``(N, P, Hkv, D)`` of undefined content on the CPU; ``stored`` is int8 or the dtype itself.

        ValueError for a dtype or a page size that there is no such order for.
        """
        num_pages, page_tokens, num_kv_heads, head_dim = pages
        stored = stored or dtype
        if stored not in _KINDS or page_tokens % STRIP_TOKENS:
            raise ValueError(f"pages of {page_tokens} tokens in {stored} have no head-major order")
        cpu, pair = torch.device("cpu"), _PAIRS[stored]
        heads = (num_pages, num_kv_heads)
        scales = [
            empty([*heads, page_tokens], torch.float32, cpu) if stored == torch.int8 else None
            for _ in range(2)
        ]
        return cls(
            empty([*heads, page_tokens // STRIP_TOKENS, head_dim // pair, STRIP_TOKENS, pair], stored, cpu),
            empty([*heads, page_tokens // pair, head_dim, pair], stored, cpu),
            dtype,
            *scales,
        )

    @property
    def page_tokens(self) -> int:
        return self.k.shape[2] * STRIP_TOKENS

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        return tuple(slab for slab in (self.k, self.v, self.k_scales, self.v_scales) if slab is not None)

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        pages, offsets = self._places(slots)
        pair = self.k.shape[5]
        if self.k_scales is not None and self.v_scales is not None:
            k, self.k_scales[pages, :, offsets] = quantize_states(k)
            v, self.v_scales[pages, :, offsets] = quantize_states(v)
        self.k[pages, :, offsets // STRIP_TOKENS, :, offsets % STRIP_TOKENS] = k.view(*k.shape[:2], -1, pair)
        self.v[pages, :, offsets // pair, :, offsets % pair] = v

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pages, offsets = self._places(slots)
        pair = self.k.shape[5]
        k = self.k[pages, :, offsets // STRIP_TOKENS, :, offsets % STRIP_TOKENS].flatten(2)
        v = self.v[pages, :, offsets // pair, :, offsets % pair]
        if self.k_scales is not None and self.v_scales is not None:
            k = k * self.k_scales[pages, :, offsets].unsqueeze(-1)
            v = v * self.v_scales[pages, :, offsets].unsqueeze(-1)
        return k.to(self.dtype), v.to(self.dtype)

    def _places(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pages = slots.div(self.page_tokens, rounding_mode="floor")
        return pages, slots - pages * self.page_tokens
