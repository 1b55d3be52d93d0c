"""How far the forms of weights are from float32 on the demo model: per block, and as perplexity on a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from petalsd.config import Quantization
from petalsd.models.block import TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.native_span import paged_span
from petalsd.models.paged_span import PagedSpan
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.weights import load_block, load_head
from petalsd.ops.norm import rms_norm
from petalsd.types import BlockSpan
from tests.paged_rows import PagedRows

CPU = torch.device("cpu")
TEXT = Path(__file__).with_name("plain_english.txt")
CHUNK_TOKENS = 1024
PAGE_TOKENS = 16
BLOCK_TOKENS = 512  # of the text, that the errors of single blocks are taken over
NUM_THREADS = 1


@dataclass(frozen=True, slots=True)
class Form:
    """A configuration: ``model.dtype`` and ``model.quantization``."""

    dtype: torch.dtype
    quantization: Quantization = "none"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return name if self.quantization == "none" else f"{self.quantization}, {name}"


FLOAT32 = Form(torch.float32)
BFLOAT16 = Form(torch.bfloat16)
INT8 = Form(torch.float32, "int8")
INT4 = Form(torch.float32, "int4")
FORMS = (FLOAT32, BFLOAT16, INT8, Form(torch.bfloat16, "int8"), INT4, Form(torch.bfloat16, "int4"))


@dataclass(frozen=True, slots=True)
class BlockError:
    """Frobenius norm of a block's error, relative to that of its output, and of what it adds to its input."""

    of_output: float
    of_added: float


class DemoNumerics:
    """The demo model over the whole text, in one sequence."""

    def __init__(self, directory: Path, tier: str = "auto") -> None:
        """``tier`` as in ``paged_span``."""
        self._source = ModelSource(str(directory))
        self._tier = tier
        self.config = BlockConfig.from_hf(self._source.config())
        self._head = load_head(self._source, self.config, torch.float32)
        paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self.ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0]

    @cached_property
    def states(self) -> list[torch.Tensor]:
        """What enters each block and what leaves the last one, in float32; ``[BLOCK_TOKENS, M]`` each."""
        states = [self._head.embed_tokens[self.ids[:BLOCK_TOKENS]]]
        for span in self._single_spans(FLOAT32):
            states.append(self._run(span, len(states) - 1, states[-1]))
        return states

    def block_errors(self, form: Form) -> list[BlockError]:
        """Of each block, when what float32 computes enters it."""
        errors = []
        for index, span in enumerate(self._single_spans(form)):
            entering, leaving = self.states[index : index + 2]
            error = (self._run(span, index, entering.to(form.dtype)).float() - leaving).norm()
            errors.append(
                BlockError(float(error / leaving.norm()), float(error / (leaving - entering).norm()))
            )
        return errors

    def perplexity(self, form: Form) -> float:
        """exp of the mean negative log-likelihood of each token after the first; norm and head in float32."""
        hidden = self._head.embed_tokens[self.ids].to(form.dtype)
        span = paged_span(dict(enumerate(self._blocks(form))), NUM_THREADS, self._tier)
        hidden = self._run(span, 0, hidden, self.config.num_blocks).float()
        normed = rms_norm(hidden, self._head.norm, self.config.norm_eps)
        loss = functional.cross_entropy(functional.linear(normed[:-1], self._head.lm_head), self.ids[1:])
        return math.exp(loss)

    def _blocks(self, form: Form) -> Iterator[TransformerBlock]:
        rope = Rope(self.config, form.dtype, CPU)
        for index in range(self.config.num_blocks):
            yield load_block(
                self._source, self.config, index, form.dtype, CPU, rope=rope, quantization=form.quantization
            )

    def _single_spans(self, form: Form) -> Iterator[PagedSpan]:
        for block in self._blocks(form):
            yield paged_span({block.index: block}, NUM_THREADS, self._tier)

    @torch.inference_mode()
    def _run(self, span: PagedSpan, start: int, hidden: torch.Tensor, num_blocks: int = 1) -> torch.Tensor:
        """``hidden`` ``[n, M]`` as one session's prefill in chunks through the blocks from ``start``."""
        config, blocks = self.config, BlockSpan(start, start + num_blocks)
        rope = Rope(config, hidden.dtype, CPU)
        num_runs = -(-len(hidden) // PAGE_TOKENS)
        rows = PagedRows(
            num_blocks, config.num_kv_heads, config.head_dim, PAGE_TOKENS, num_runs, hidden.dtype
        )
        rows.first_block = start
        row = rows.add_row()
        answers = []
        for chunk in hidden.split(CHUNK_TOKENS):
            batch = rows.extend({row: len(chunk)})
            cos_sin = rope.cos_sin(batch.positions)
            answers.append(span.forward_paged(blocks, chunk, rows.kv, batch, cos_sin))
        return torch.cat(answers)
