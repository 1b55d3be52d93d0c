"""How far what is served is from float32 on the demo model: per block, and as perplexity on a text.

Everything runs as the engine runs it: in C++ over packed weights, and over pages in the kernels' order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from petalsd.client.head import LocalHead
from petalsd.config import Quantization
from petalsd.engine.cache_geometry import cache_geometry
from petalsd.models.block_config import BlockConfig
from petalsd.models.head_rule import HeadRule
from petalsd.models.head_weights import load_head
from petalsd.models.native_span import NativeSpan
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.spans import paged_span
from petalsd.models.weights import load_block
from petalsd.types import BlockSpan
from tests.paged_rows import PagedRows

CPU = torch.device("cpu")
TEXT = Path(__file__).with_name("plain_english.txt")
CHUNK_TOKENS = 512
PAGE_TOKENS = 32
BLOCK_TOKENS = 512  # of the text, that the errors of single blocks are taken over


@dataclass(frozen=True, slots=True)
class Form:
    """A configuration: ``model.dtype``, ``model.quantization`` and ``engine.kv_dtype``."""

    dtype: torch.dtype
    quantization: Quantization = "none"
    kv_dtype: Literal["auto", "int8"] = "auto"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        weights = [] if self.quantization == "none" else [self.quantization]
        return ", ".join([*weights, dtype, *(["int8 KV"] if self.kv_dtype == "int8" else [])])


FLOAT32 = Form(torch.float32)
BFLOAT16 = Form(torch.bfloat16)
INT8 = Form(torch.float32, "int8")
INT4 = Form(torch.float32, "int4")
INT8_KV = Form(torch.float32, kv_dtype="int8")
FORMS = tuple(
    Form(dtype, quantization, kv_dtype)
    for quantization in ("none", "int8", "int4")
    for dtype in (torch.float32, torch.bfloat16)
    for kv_dtype in ("auto", "int8")
)
"""All that are served on a CPU."""


@dataclass(frozen=True, slots=True)
class BlockError:
    """Frobenius norm of a block's error, relative to that of its output, and of what it adds to its input."""

    of_output: float
    of_added: float


class DemoNumerics:
    """The demo model over the text, in one sequence."""

    def __init__(self, directory: Path, tier: str = "auto", num_tokens: int | None = None) -> None:
        """``tier`` as in ``paged_span``; ``num_tokens`` is how much of the text is read, by default all."""
        self._source = ModelSource(str(directory))
        self._tier = tier
        self._spans: dict[tuple[torch.dtype, Quantization], NativeSpan] = {}
        self.config = BlockConfig.from_hf(self._source.config())
        rule = HeadRule(norm_eps=self.config.norm_eps)
        self._head = LocalHead(load_head(self._source, self.config, rule, torch.float32), rule)
        paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self.ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0, :num_tokens]

    @property
    def whole(self) -> BlockSpan:
        """All blocks."""
        return BlockSpan(0, self.config.num_blocks)

    @cached_property
    def embedded(self) -> torch.Tensor:
        """What enters the first block; float32 ``[n, M]``."""
        return cast(torch.Tensor, self._head.embed_tokens(self.ids))

    @cached_property
    def states(self) -> list[torch.Tensor]:
        """What enters each block and what leaves the last one, in float32; ``[BLOCK_TOKENS, M]`` each."""
        states = [self.embedded[:BLOCK_TOKENS]]
        for index in self.whole:
            states.append(self.run(FLOAT32, states[-1], BlockSpan(index, index + 1)))
        return states

    def block_errors(self, form: Form) -> list[BlockError]:
        """Of each block, when what float32 computes enters it."""
        errors = []
        for index in self.whole:
            entering, leaving = self.states[index : index + 2]
            error = (self.run(form, entering, BlockSpan(index, index + 1)) - leaving).norm()
            errors.append(
                BlockError(float(error / leaving.norm()), float(error / (leaving - entering).norm()))
            )
        return errors

    def perplexity(self, form: Form) -> float:
        """exp of the mean negative log-likelihood of each token after the first; norm and head in float32."""
        logits = self._head.logits(self.run(form, self.embedded)[:-1])
        loss = functional.cross_entropy(logits, self.ids[1:])
        return math.exp(loss)

    def span(self, form: Form) -> NativeSpan:
        """All blocks of this form, as the engine computes them; loaded once."""
        key = form.dtype, form.quantization
        if key not in self._spans:
            rope = Rope(self.config, form.dtype, CPU)
            blocks = {
                index: load_block(
                    self._source,
                    self.config,
                    index,
                    form.dtype,
                    CPU,
                    rope=rope,
                    quantization=form.quantization,
                )
                for index in self.whole
            }
            span = paged_span(blocks, torch.get_num_threads(), self._tier)
            assert isinstance(span, NativeSpan), "the demo model is computed in C++"
            self._spans[key] = span
        return self._spans[key]

    def run(self, form: Form, hidden: torch.Tensor, blocks: BlockSpan | None = None) -> torch.Tensor:
        """``hidden`` ``[n, M]`` as one session's prefill in chunks through ``blocks``; float32 ``[n, M]``."""
        session = DemoSession(self, form, [len(hidden)], blocks)
        return torch.cat([session.step([chunk]) for chunk in hidden.split(CHUNK_TOKENS)])


class DemoSession:
    """Rows of the demo model, in pages as the engine makes them."""

    def __init__(
        self, model: DemoNumerics, form: Form, row_tokens: Sequence[int], blocks: BlockSpan | None = None
    ) -> None:
        """Rows of at most so many tokens each, through ``blocks``, by default all."""
        config = model.config
        stored = torch.int8 if form.kv_dtype == "int8" else None
        geometry = cache_geometry(config, PAGE_TOKENS, form.dtype, CPU, stored)
        assert geometry.is_head_major, "the kernels read these pages"
        self._form, self._span, self._blocks = form, model.span(form), blocks or model.whole
        self._rope = Rope(config, form.dtype, CPU)
        num_runs = sum(map(geometry.tokens_to_pages, row_tokens))
        num_blocks = len(self._blocks)
        self._rows = PagedRows(
            num_blocks, config.num_kv_heads, config.head_dim, PAGE_TOKENS, num_runs, form.dtype
        ).in_head_major(stored)
        self._rows.first_block = self._blocks.start
        self._ids = [self._rows.add_row() for _ in row_tokens]

    @torch.inference_mode()
    def step(self, new: Sequence[torch.Tensor]) -> torch.Tensor:
        """The next tokens' states ``[n, M]`` of each row, in one batch; float32, one row after the other."""
        batch = self._rows.extend({row: len(states) for row, states in zip(self._ids, new, strict=True)})
        hidden, cos_sin = torch.cat(list(new)).to(self._form.dtype), self._rope.cos_sin(batch.positions)
        return self._span.forward_paged(self._blocks, hidden, self._rows.kv, batch, cos_sin).float()
