"""Variants of attention over pages: what the supported families compile in, and pages of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.variants import FLOAT8_TARGETS, TARGETS, Limits, Matrix, Variant, meta
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import DecodePlan, decode_attention
from petalsd.ops.decode_batch import DecodeBatch, PrefillBatch
from petalsd.ops.eight_bit_kv import Float8KV, Int8KV
from petalsd.ops.launching import Launch, launch, record_launches
from petalsd.ops.page_copies import copy_pages
from petalsd.ops.prefill_attention import prefill_attention
from petalsd.ops.ragged import PagedKV

_ROWS, _TOKENS, _PAGES, _PAGE_TOKENS, _MAX_RUNS = 8, 256, 1024, 16, 64
_MULTIPROCESSORS, _MAX_CONTEXT = 132, 32768

# Two warps in decode and four in prefill: with all registers that there are, four or two programs of either fill a
# multiprocessor. Scales of 8-bit pages are fetched ahead in 4 bytes.
_PLAIN = Limits(255, Matrix.FEW_ROWS, is_async=True, narrow_copies=8)
_EIGHT_BIT = Limits(168, Matrix.FEW_ROWS, is_async=True, narrow_copies=24)
_PREFILL = Limits(255, Matrix.MANY_ROWS, is_async=True)
# No matrix instruction multiplies float32 without rounding it.
_EXACT = Limits(160, Matrix.NONE, is_async=True, narrow_copies=8)
_PREFILL_EIGHT_BIT = Limits(232, Matrix.MANY_ROWS, is_async=True, narrow_copies=32)


@dataclass(frozen=True, slots=True)
class Attention:
    """Of one family; ``stored`` is what the pages are, when not of ``dtype``."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    has_biases: bool = False
    rounds_biases: bool = False
    stored: type[Int8KV | Float8KV] | None = None
    dtype: torch.dtype = torch.bfloat16

    def limits(self) -> tuple[Limits, Limits]:
        """Of decode and of prefill."""
        if self.dtype == torch.float32:
            return _EXACT, _EXACT
        return (_PLAIN, _PREFILL) if self.stored is None else (_EIGHT_BIT, _PREFILL_EIGHT_BIT)

    def rule(self) -> AttentionRule:
        per_head = meta(self.heads, dtype=torch.float32)
        return AttentionRule(
            self.head_dim**-0.5,
            self.window,
            self.softcap,
            sinks=per_head if self.has_sinks else None,
            slopes=per_head if self.has_biases else None,
            rounds_biases=self.rounds_biases,
        )

    def pages(self) -> PagedKV:
        shape, here = (_PAGES, _PAGE_TOKENS, self.kv_heads, self.head_dim), torch.device("meta")
        if self.stored is None:
            return PagedKV(meta(*shape, dtype=self.dtype), meta(*shape, dtype=self.dtype))
        return self.stored.allocate(shape, self.dtype, here)

    def queries(self, count: int) -> torch.Tensor:
        return meta(count, self.heads, self.head_dim, dtype=self.dtype)


TESTED = {
    "Llama-3.1-8B": Attention(32, 8, 128),
    "Phi-3-mini": Attention(32, 32, 96, window=2047),
    "Gemma-2-9B": Attention(16, 8, 256, window=4096, softcap=50.0),
    "gpt-oss-20b": Attention(64, 8, 64, window=128, has_sinks=True),
    "BLOOM-7B": Attention(32, 32, 128, has_biases=True),
    "DeepSeek-V3": Attention(128, 128, 192),
    "Llama-3.1-8B, int8": Attention(32, 8, 128, stored=Int8KV),
    "Llama-3.1-8B, float8": Attention(32, 8, 128, stored=Float8KV),
    "SmolLM2-135M, float32": Attention(9, 3, 64, dtype=torch.float32),
}

OTHERS = {
    "SmolLM2-135M": Attention(9, 3, 64),
    "Falcon-7B": Attention(71, 1, 64),
    "Falcon-RW-1B": Attention(32, 32, 64, has_biases=True, rounds_biases=True),
    "Llama-3.1-8B, float32": Attention(32, 8, 128, dtype=torch.float32),
    "Phi-3-mini, float32": Attention(32, 32, 96, window=2047, dtype=torch.float32),
    "Gemma-2-9B, float32": Attention(16, 8, 256, window=4096, softcap=50.0, dtype=torch.float32),
    "BLOOM-7B, float32": Attention(32, 32, 128, has_biases=True, dtype=torch.float32),
    "Llama-2-7B": Attention(32, 32, 128),
    "Llama-3.1-70B": Attention(64, 8, 128),
    "Llama-3.1-405B": Attention(128, 8, 128),
    "Mistral-7B-v0.1": Attention(32, 8, 128, window=4096),
    "Phi-2": Attention(32, 32, 80),
    "Gemma-2-9B, full layers": Attention(16, 8, 256, softcap=50.0),
    "gpt-oss-20b, full layers": Attention(64, 8, 64, has_sinks=True),
    "Falcon-40B": Attention(128, 8, 64),
    "GLM-4.7-Flash": Attention(20, 20, 256),
    "DeepSeek-V3, int8": Attention(128, 128, 192, stored=Int8KV),
    "DeepSeek-V3, float8": Attention(128, 128, 192, stored=Float8KV),
    "DeepSeek-V3, float32": Attention(128, 128, 192, dtype=torch.float32),
    "SmolLM2-135M, int8": Attention(9, 3, 64, stored=Int8KV),
    "SmolLM2-135M, float8": Attention(9, 3, 64, stored=Float8KV),
    "Mistral-7B-v0.1, float8": Attention(32, 8, 128, window=4096, stored=Float8KV),
    "Phi-3-mini, float8": Attention(32, 32, 96, window=2047, stored=Float8KV),
    "Gemma-2-9B, float8": Attention(16, 8, 256, window=4096, softcap=50.0, stored=Float8KV),
    "BLOOM-7B, float8": Attention(32, 32, 128, has_biases=True, stored=Float8KV),
    "Mistral-7B-v0.1, int8": Attention(32, 8, 128, window=4096, stored=Int8KV),
    "Phi-3-mini, int8": Attention(32, 32, 96, window=2047, stored=Int8KV),
    "Gemma-2-9B, int8": Attention(16, 8, 256, window=4096, softcap=50.0, stored=Int8KV),
    "BLOOM-7B, int8": Attention(32, 32, 128, has_biases=True, stored=Int8KV),
}


def variants(is_full: bool) -> Iterator[Variant]:
    for name, attention in {**TESTED, **(OTHERS if is_full else {})}.items():
        targets = FLOAT8_TARGETS if attention.stored is Float8KV else TARGETS
        decode, prefill = attention.limits()
        yield Variant(f"decode {name}", partial(_decode, attention, _MULTIPROCESSORS), decode, targets)
        yield Variant(f"prefill {name}", partial(_prefill, attention), prefill, targets)
    one_split = partial(_decode, TESTED["Llama-3.1-8B"], 1)
    yield Variant("decode Llama-3.1-8B, one split", one_split, _PLAIN)
    for name in ("Llama-3.1-8B", "SmolLM2-135M, int8"):  # cut into so many parts that they are combined apart
        attention = {**TESTED, **OTHERS}[name]
        apart = partial(_decode, attention, _MULTIPROCESSORS, rows=1)
        yield Variant(f"decode {name}, one row", apart, attention.limits()[0])
    yield Variant("combine 32x128, 64 splits", partial(_combine, TESTED["Llama-3.1-8B"]), Limits())
    yield Variant("copy_pages 8x128", partial(_copy, TESTED["Llama-3.1-8B"]), Limits())


def _integers(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def _decode(attention: Attention, num_sms: int, rows: int = _ROWS) -> None:
    _launch_again(_decode_launches(attention, num_sms, rows)[0])


def _combine(attention: Attention) -> None:
    _launch_again(_decode_launches(attention, _MULTIPROCESSORS, rows=1)[1])


def _launch_again(one: Launch) -> None:
    """So that a variant has one kernel: the two of a decode have different limits."""
    launch(one.kernel, one.grid, one.arguments, one.constants, one.options)


def _decode_launches(attention: Attention, num_sms: int, rows: int) -> list[Launch]:
    q, pages = attention.queries(rows), attention.pages()
    places = _integers(rows)
    batch = DecodeBatch(places, places, _integers(rows, _MAX_RUNS), places, places)
    plan = DecodePlan.create(rows, attention.heads, pages, num_sms, attention.window or _MAX_CONTEXT)
    with record_launches() as launches:
        decode_attention(q, pages, batch, 3, attention.rule(), plan, q)
    return launches


def _prefill(attention: Attention) -> None:
    q = attention.queries(_TOKENS)
    places, lengths = _integers(_TOKENS), _integers(_ROWS)
    origins, starts = _integers(_ROWS, _MAX_RUNS), _integers(_ROWS + 1)
    batch = PrefillBatch(places, lengths, origins, places, places, starts)
    prefill_attention(q, attention.pages(), batch, 3, attention.rule(), q)


def _copy(attention: Attention) -> None:
    copy_pages(attention.pages(), _integers(_ROWS), _integers(_ROWS))
