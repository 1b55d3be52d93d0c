"""Random tokens through a block, as a session would send them, and through transformers' layer: do they agree?

The check runs at load time on the machine that will serve, so that a kernel that computes wrongly on this
processor, or a layer that a newer transformers changed, is noticed before anything is served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

from petalsd.models.contract import Angles, Block
from petalsd.models.hf.angles import LayerAngles
from petalsd.models.hf.block import first_tensor
from petalsd.models.hf.layer import Layers
from petalsd.models.model_config import ModelConfig
from petalsd.models.native_span import can_attend_natively
from petalsd.models.spans import paged_span
from petalsd.ops.attention_plan import visible_keys
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.types import BlockSpan

Steps: TypeAlias = tuple[tuple[int, ...], ...]
"""How many tokens each row gets in each step."""

STEPS: Steps = ((14, 30), (1, 1), (1, 1), (1, 1))
"""A prefill, whose last page is not full, and decode steps, the second of which fills a first page."""

MANY_ROWS = (70, 5)
"""A later chunk, on a GPU: more than 64 rows have kernels of their own there, and attend to what was written."""

_PAGE_TOKENS = 16
_SEED = 4
_FLOORS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.003}
_ROUNDED_FLOOR = 0.1  # activations that are rounded to 8 bits cost a few percent
_FACTOR = 3.0
_SPARSE_QUANTILE = 0.75


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a trial, the same for every block of a model.

    rows   ``[n, M]`` float32 each
    steps  in which they are sent
    """

    rows: tuple[torch.Tensor, ...]
    steps: Steps

    @classmethod
    def draw(cls, hidden_size: int, steps: Steps, device: torch.device) -> Tokens:
        generator = torch.Generator().manual_seed(_SEED)
        lengths = [sum(counts) for counts in zip(*steps, strict=True)]
        drawn = [torch.randn(length, hidden_size, generator=generator) for length in lengths]
        return cls(tuple(row.to(device) for row in drawn), steps)

    def through_layer(
        self, layer: nn.Module, layers: Layers, config: ModelConfig, index: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """What transformers' unchanged layer makes of the rows, whole and without a cache: ``[T, M]`` float32."""
        device = self.rows[0].device
        angles = LayerAngles(layers.family, layers.hf, config, dtype, device)
        part = angles.slice_of(layers.layer_type(index))
        outputs = []
        for row in self.rows:
            positions = torch.arange(len(row), device=device)
            visible = visible_keys(positions, positions, config.windows[index])
            mask = torch.zeros(visible.shape, dtype=dtype, device=device)
            mask.masked_fill_(~visible, torch.finfo(dtype).min)
            arguments = layers.family.plain_arguments(layers.hf, len(row), dtype)
            arguments = {key: None if value is None else value.to(device) for key, value in arguments.items()}
            with torch.inference_mode():
                output = layer(
                    row.to(dtype)[None],
                    attention_mask=mask[None, None],
                    position_ids=positions[None],
                    position_embeddings=tuple(one[None] for one in angles.cos_sin(positions)[part]),
                    **arguments,
                )
            outputs.append(first_tensor(output)[0].float())
        return torch.cat(outputs)

    def through_pages(self, block: Block, angles: Angles, num_threads: int) -> torch.Tensor:
        """What a block makes of the rows with a cache, step by step; as above."""
        served, span = BlockSpan(block.index, block.index + 1), paged_span({block.index: block}, num_threads)
        runs_per_row = _runs(max(len(row) for row in self.rows))
        kv = _empty_pages(block, len(self.rows) * runs_per_row)
        outputs: list[list[torch.Tensor]] = [[] for _ in self.rows]
        starts = [0] * len(self.rows)
        for counts in self.steps:
            batch = _batch(starts, counts, runs_per_row, block)
            ends = batch.context_lens
            new = [row[start:end] for row, start, end in zip(self.rows, starts, ends, strict=True)]
            # As chunks of one long step, so that angles that depend on a row's length are those of the whole row.
            lengths = torch.tensor([len(row) for row in self.rows])
            seq_lens = lengths.repeat_interleave(torch.tensor(counts))
            with torch.inference_mode():
                cos_sin = angles.cos_sin(batch.positions, seq_lens)
                hidden = torch.cat(new).to(block.dtype)
                states = span.forward_paged(served, hidden, kv, batch, cos_sin)
            for row, part in enumerate(torch.split(states.float(), list(counts))):
                outputs[row].append(part)
            starts = list(ends)
        return torch.cat([torch.cat(parts) for parts in outputs])

    def through_passes(self, block: Block) -> torch.Tensor:
        """What a block makes of the rows without a cache; as above."""
        with torch.inference_mode():
            return torch.cat([block.forward_dense(row.to(block.dtype)[None])[0].float() for row in self.rows])


@dataclass(frozen=True, slots=True)
class Reference:
    """What is expected of a block.

    entering   ``[T, M]`` float32, the tokens of all rows
    expected   ``[T, M]`` float32, what transformers' layer makes of them in float32
    is_sparse  in a sparse block a rounding can send a token to another expert
    tolerance  of ``error_of``: three times what transformers' own layer has in the serving dtype, and at least
               1e-4 in float32, 0.02 in bfloat16, 0.003 in float16, and 0.1 with weights of a few bits, where
               kernels round activations too
    """

    entering: torch.Tensor
    expected: torch.Tensor
    is_sparse: bool
    tolerance: float = math.inf

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        wide: torch.Tensor,
        narrow: torch.Tensor,
        dtype: torch.dtype,
        *,
        is_sparse: bool,
        is_quantized: bool,
    ) -> Reference:
        """From what the layer computed in float32 and in ``dtype``."""
        reference = cls(torch.cat(tokens.rows), wide, is_sparse)
        floor = _ROUNDED_FLOOR if is_quantized else _FLOORS[dtype]
        tolerance = max(floor, _FACTOR * reference.error_of(narrow))
        return replace(reference, tolerance=tolerance)

    @property
    def is_finite(self) -> bool:
        """Whether anything can be compared with it."""
        return bool(torch.isfinite(self.expected).all())

    def error_of(self, actual: torch.Tensor) -> float:
        """The worst token's error, relative to what the block adds to a token's states (root mean square of all).

        In a sparse block it is the third quartile of the tokens' errors. Infinite where anything is not finite.
        """
        errors = (actual - self.expected).pow(2).mean(dim=-1).sqrt()
        added = (self.expected - self.entering).pow(2).mean().sqrt().clamp_min(1e-12)
        if not bool(torch.isfinite(errors).all()):
            return math.inf
        return float((errors.quantile(_SPARSE_QUANTILE) if self.is_sparse else errors.max()) / added)


def _runs(num_tokens: int) -> int:
    return -(-num_tokens // _PAGE_TOKENS)


def _empty_pages(block: Block, num_pages: int) -> PagedKV:
    """In the kernels' order where these compute the block."""
    config, dtype, device = block.config, block.dtype, block.device
    shape = (1 + num_pages, _PAGE_TOKENS, config.num_kv_heads, config.head_dim)
    if can_attend_natively(block):
        kv: PagedKV = HeadMajorKV.allocate(shape, dtype)
    else:
        kv = PagedKV(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
    for slab in kv.slabs:
        slab.fill_(torch.nan)
    return kv


def _batch(starts: list[int], counts: tuple[int, ...], runs_per_row: int, block: Block) -> RaggedBatch:
    """The next ``counts`` tokens of rows that are at ``starts``; a row's pages for the block lie side by side."""
    device = block.device
    first_pages = torch.arange(len(starts) * runs_per_row).view(len(starts), -1) + 1 - block.index
    rows = torch.arange(len(starts)).repeat_interleave(torch.tensor(counts))
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    positions = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    return RaggedBatch(
        token_bounds=[0, *torch.tensor(counts).cumsum(0).tolist()],
        context_lens=ends,
        positions=positions.to(device),
        origins=first_pages.to(device, torch.int32),
        write_origins=first_pages[rows, positions // _PAGE_TOKENS].to(device),
        write_offsets=(positions % _PAGE_TOKENS).to(device),
    )
