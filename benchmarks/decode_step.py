"""One decode step through all blocks of the demo model, in process: transformers and the engine's CPU path.

    python -m benchmarks.decode_step [--dtypes float32 bfloat16] [--batches 1 8 32] [--threads 1] [--tiers auto]

Rows of random states behind a random context; both compute on the same weights and take turns, so that they meet
the same machine. GB/s are those of weights, keys and values, each read once.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.report import Row, publish
from benchmarks.timing import summarize
from petalsd.models.block import TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.native_span import paged_span
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.weights import load_block
from petalsd.ops.memory import empty
from petalsd.ops.ragged import PagedKV
from petalsd.types import BlockSpan
from tests.paged_rows import PagedRows

DEMO_MODEL = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model"))
CPU = torch.device("cpu")
PAGE_TOKENS = 16
ROUNDS = 5
ROUND_S = 0.3

Step: TypeAlias = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="A decode step through all blocks, in process.")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--tiers", nargs="+", default=["auto"], help="kernels of petalsd, see petalsd/_C.pyi")
    parser.add_argument("--context", type=int, default=256)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for dtype in options.dtypes:
        model = Model(options.model.resolve(), getattr(torch, dtype))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batches:
                setting = f"{dtype}, batch {batch}, context {options.context}, {threads} thread(s)"
                rows += measure(model, batch, options.context, threads, options.tiers, setting)
    publish("decode_step", rows)


class Model:
    """Our blocks and transformers' layers of one checkpoint, in one dtype."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        source = ModelSource(str(path))
        self.dtype = dtype
        self.config = BlockConfig.from_hf(source.config())
        self.rope = Rope(self.config, dtype, CPU)
        self.reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).model
        self.blocks: dict[int, TransformerBlock] = {
            index: load_block(source, self.config, index, dtype, CPU, rope=self.rope)
            for index in range(self.config.num_blocks)
        }

    def step_bytes(self, batch: int, context: int) -> int:
        """What a step must read at least."""
        config = self.config
        kv_elements = 2 * context * config.num_kv_heads * config.head_dim * config.num_blocks
        return sum(block.nbytes for block in self.blocks.values()) + batch * kv_elements * self.dtype.itemsize

    def petalsd_step(self, batch: int, context: int, threads: int, tier: str) -> Step:
        config = self.config
        num_runs = batch * (context // PAGE_TOKENS + 1)
        rows = PagedRows(config.num_blocks, config.num_kv_heads, config.head_dim, PAGE_TOKENS, num_runs)
        k, v = (empty(rows.kv.k.shape, self.dtype, CPU).normal_() for _ in range(2))
        rows.kv = PagedKV(k, v)
        ids = [rows.add_row() for _ in range(batch)]
        rows.extend(dict.fromkeys(ids, context))
        ragged = rows.extend(dict.fromkeys(ids, 1))
        hidden = torch.randn(batch, config.hidden_size).to(self.dtype)
        span, cos_sin = paged_span(self.blocks, threads, tier), self.rope.cos_sin(ragged.positions)
        whole = BlockSpan(0, config.num_blocks)
        return lambda: span.forward_paged(whole, hidden, rows.kv, ragged, cos_sin)

    def transformers_step(self, batch: int, context: int) -> Step:
        cache = DynamicCache(config=self.reference.config)
        states = torch.randn(batch, context + 1, self.config.hidden_size).to(self.dtype)
        self.reference(inputs_embeds=states[:, :context], past_key_values=cache, use_cache=True)

        def step() -> None:
            self.reference(inputs_embeds=states[:, context:], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return step


@torch.inference_mode()
def measure(
    model: Model, batch: int, context: int, threads: int, tiers: list[str], setting: str
) -> list[Row]:
    """Milliseconds of each provider's steps, and what they make of the memory."""
    steps = {"transformers": model.transformers_step(batch, context)}
    for tier in tiers:
        steps[f"petalsd, {tier}"] = model.petalsd_step(batch, context, threads, tier)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            samples[name] += time_steps(step)
    gigabytes = model.step_bytes(batch, context) / 1e9
    rows = []
    for name, seconds in samples.items():
        milliseconds = summarize([1e3 * each for each in seconds])
        rows.append(Row(name, setting, "decode step of all blocks", "ms", milliseconds))
        speed = summarize([gigabytes / each for each in seconds])
        rows.append(Row(name, setting, "memory read by a decode step", "GB/s", speed))
    return rows


def time_steps(step: Step) -> list[float]:
    """Seconds of each step of a round, the first one left out."""
    step()
    samples: list[float] = []
    end = time.perf_counter() + ROUND_S
    while not samples or time.perf_counter() < end:
        started = time.perf_counter()
        step()
        samples.append(time.perf_counter() - started)
    return samples


if __name__ == "__main__":
    main()
