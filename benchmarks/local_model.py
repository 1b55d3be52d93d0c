"""One checkpoint computed in this process: by petalsd's blocks in some format, and by transformers.

A format is how weights are held: a dtype, or quantized integers. Keys, values and states are bfloat16 in the
quantized formats.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.timing import Work
from petalsd.config import EngineSection, Quantization
from petalsd.engine.batch import BatchItem, build_batch
from petalsd.engine.cache_geometry import cache_geometry
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest
from petalsd.kvcache.sizing import KVGeometry, pages_for
from petalsd.models.architecture import Architecture
from petalsd.models.block_config import BlockConfig
from petalsd.models.contract import Block
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.spans import paged_span
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import block_tensors, load_block
from petalsd.types import BlockSpan

CPU = torch.device("cpu")
PAGE_TOKENS = EngineSection().page_tokens
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REFERENCE_FORMATS = tuple(_DTYPES)
_QUANTIZED: dict[str, Quantization] = {"int8": "int8", "int4": "int4"}
# int8 has a scale for each row, which is next to nothing; int4 a scale of 2 bytes for each group of 64.
_PARAMETER_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 64}
_PATTERN_ELEMENTS = 1 << 20


def formats() -> list[str]:
    """All that petalsd loads."""
    return [*_DTYPES, *_QUANTIZED]


def dtype_of(kind: str) -> torch.dtype:
    """Of states, keys and values of a model in this format."""
    return _DTYPES.get(kind, torch.bfloat16)


def available_bytes() -> int:
    """Memory that this machine could still give to a process."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class LocalModel:
    """All blocks of a model directory, in one format."""

    def __init__(self, path: Path, kind: str) -> None:
        source = ModelSource(str(path))
        self.format = kind
        self.dtype = dtype_of(kind)
        self.config = BlockConfig.from_hf(source.config())
        self.rope = Rope(self.config, self.dtype, CPU)
        how: Quantization = _QUANTIZED.get(kind, "none")
        self.blocks: dict[int, Block] = {
            index: load_block(source, self.config, index, self.dtype, CPU, rope=self.rope, quantization=how)
            for index in range(self.config.num_blocks)
        }

    @property
    def span(self) -> BlockSpan:
        return BlockSpan(0, self.config.num_blocks)

    @property
    def model_bytes(self) -> float:
        """What the blocks' parameters take in this format, without any padding or second copy."""
        shapes = [shape for index in self.span for shape in block_tensors(self.config, index).values()]
        return sum(math.prod(shape) for shape in shapes) * _PARAMETER_BYTES[self.format]

    @property
    def geometry(self) -> KVGeometry:
        """Pages as a server has them, so that steps take the way that they take there."""
        return cache_geometry(self.config, PAGE_TOKENS, self.dtype, CPU)

    def kv_bytes(self, rows: int, context: int) -> int:
        """Keys and values of ``context`` tokens in each of ``rows`` rows, in all blocks."""
        return rows * context * self.config.num_blocks * self.geometry.page_bytes // PAGE_TOKENS

    def empty_pool(self, kv_tokens: int) -> KVPool:
        """Room for ``kv_tokens`` tokens in each block, which the system has not mapped yet."""
        num_pages = pages_for(kv_tokens, self.config.num_blocks, PAGE_TOKENS)
        pool = KVPool(self.geometry, num_pages, self.dtype, CPU)
        pool.allocate()
        return pool

    def filled_pool(self, kv_tokens: int) -> KVPool:
        """The same, full of random values of unit variance."""
        pool = self.empty_pool(kv_tokens)
        for slab in pool.kv.slabs:
            _fill(slab)
        return pool

    def step(self, rows: int, context: int, tokens: int, threads: int) -> Work:
        """A step of ``tokens`` new tokens in each of ``rows`` rows behind ``context`` tokens, through all blocks.

        It writes the same places again whenever it is called.
        """
        row_tokens = -(-(context + tokens) // PAGE_TOKENS) * PAGE_TOKENS
        pool = self.filled_pool(rows * row_tokens)
        hidden = torch.randn(rows * tokens, self.config.hidden_size).to(self.dtype)
        items = []
        for part in hidden.split(tokens):
            kv = asyncio.run(pool.reserve(KVRequest(0, self.config.num_blocks, 1, row_tokens), 0.0))
            kv.extend(context + tokens)
            items.append(BatchItem(self.span, kv, 1, context, tokens, context + tokens, part))
        batch = build_batch(items, pool).ragged
        cos_sin = self.rope.cos_sin(batch.positions)
        span, whole = paged_span(self.blocks, threads), self.span

        @torch.inference_mode()
        def work() -> None:
            torch.set_num_threads(threads)
            span.forward_paged(whole, hidden, pool.kv, batch, cos_sin)

        return work


class LayerModel(LocalModel):
    """The same as families without a fused block are computed: transformers' layers over packed weights."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, kind)
        source = ModelSource(str(path))
        storage = WeightStorage.choose(self.dtype, CPU, _QUANTIZED.get(kind, "none"))
        ladder = Ladder(Architecture.read(source.config()), source, storage, num_threads=1)
        self.blocks = {index: ladder.build(Rung.PACKED, index) for index in self.span}


class ReferenceModel:
    """transformers' layers of a model directory, in a dtype."""

    def __init__(self, path: Path, kind: str) -> None:
        self.dtype = dtype_of(kind)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).model
        self.model.requires_grad_(False)

    @torch.inference_mode()
    def step(self, rows: int, context: int, tokens: int, threads: int) -> Work:
        """As ``LocalModel.step``; each call starts from the same cache."""
        config = self.model.config
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers if context else 0):
            shape = (rows, config.num_key_value_heads, context, config.head_dim)
            cache.update(*(_fill(torch.empty(shape, dtype=self.dtype)) for _ in range(2)), layer)
        states = torch.randn(rows, tokens, config.hidden_size).to(self.dtype)

        @torch.inference_mode()
        def work() -> None:
            torch.set_num_threads(threads)
            past = cache if context else DynamicCache(config=config)
            self.model(inputs_embeds=states, past_key_values=past, use_cache=True)
            if context:
                cache.crop(-tokens)

        return work


def load_models(path: Path, kind: str) -> tuple[LocalModel, ReferenceModel | None]:
    """Ours in this format, and transformers' where it has the format."""
    return LocalModel(path, kind), ReferenceModel(path, kind) if kind in REFERENCE_FORMATS else None


def thread_counts(threads: int) -> Iterator[int]:
    """One, and all that there are."""
    yield from sorted({1, threads})


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    """Random values, repeated: drawing billions of them would take longer than the benchmark."""
    flat = tensor.view(-1)
    pattern = torch.randn(min(len(flat), _PATTERN_ELEMENTS)).to(tensor.dtype)
    for part in flat.split(_PATTERN_ELEMENTS):
        part.copy_(pattern[: len(part)])
    return tensor
