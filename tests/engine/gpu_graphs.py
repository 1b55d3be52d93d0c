"""Run by ``test_gpu_graphs`` in a process without Triton's interpreter: captured steps on a real GPU, in bfloat16.

    python -m tests.engine.gpu_graphs MODEL

Prints one JSON object: what a step launches, and how far replays are from steps that are launched anew.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from petalsd.engine.batch import BatchItem
from petalsd.engine.captures import Captures, Capturing
from petalsd.engine.graphed_span import GraphedSpan
from petalsd.engine.graphs import CudaGraphs
from petalsd.engine.observer import NullObserver
from petalsd.engine.staging import Staged
from petalsd.engine.step_memory import GraphLimits
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest
from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.architecture import Architecture
from petalsd.models.ladder import Ladder
from petalsd.models.source import ModelSource
from petalsd.models.spans import paged_span
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.tiny_models import LAYER_VARIANTS, make_tiny

DEVICE, DTYPE = torch.device("cuda:0"), torch.bfloat16
LIMITS = GraphLimits(max_rows=8, max_runs=16, max_tokens=256)
SPAN = BlockSpan(0, 2)
PAGE_TOKENS = 32
STARTS = [40, 3, 0, 150, 9]


class KeptGraphs(CudaGraphs):
    """Keeps what it captures, to be looked into."""

    def __init__(self) -> None:
        super().__init__(DEVICE, is_inspected=True)
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self.graphs.append(super().capture(compute))
        return self.graphs[-1]


def load(path: Path, model: str) -> Any:
    """What serves two blocks of a variant of tiny models, on their best rung."""
    family, overrides = {**LAYER_VARIANTS, "llama": ("llama", {"head_dim": 64, "hidden_size": 256})}[model]
    make_tiny(family, path, **overrides)
    source, storage = ModelSource(str(path)), WeightStorage.choose(DTYPE, DEVICE)
    ladder = Ladder(Architecture.read(source.config()), source, storage, 1)
    return paged_span({index: ladder.load(index) for index in SPAN}, 1)


def make_pool(span: Any) -> KVPool:
    """Full of random keys and values."""
    geometry = KVGeometry(PAGE_TOKENS, span.config.num_kv_heads, span.config.head_dim, DTYPE)
    pool = KVPool(geometry, 100, DTYPE, DEVICE)
    for slab in pool.allocate().slabs:
        slab.normal_()
    return pool


async def make_items(pool: KVPool, hidden: torch.Tensor) -> list[BatchItem]:
    """A row with a new token at each of ``STARTS``."""
    items = []
    for start, states in zip(STARTS, hidden.split(1), strict=True):
        kv = await pool.reserve(KVRequest(0, len(SPAN), 1, start + 1), timeout_s=0)
        kv.extend(start + 1)
        items.append(BatchItem(SPAN, kv, 1, start, 1, start + 1, states))
    return items


def kernels_of(graph: torch.cuda.CUDAGraph) -> list[str] | None:
    """Their names; None where torch, the driver or its bindings are too old to tell."""
    try:
        nodes: list[dict[str, Any]] = graph.get_graph_data()["nodes"]
    except (AttributeError, RuntimeError):
        return None
    return [node["kernel_name"] or node["node_type"] for node in nodes]


def recovers() -> bool:
    """Whether a capture that the device refuses leaves others possible, and torch able to give memory back."""
    graphs, x = CudaGraphs(DEVICE), torch.ones(8, device=DEVICE)

    def read_a_value() -> None:
        x.mul_(x.sum().item())

    def double() -> None:
        x.mul_(2)

    try:
        graphs.capture(read_a_value)
    except RuntimeError:
        torch.cuda.empty_cache()
        graphs.warm_up(double)
        graphs.capture(double).replay()
        return x.sum().item() == 32.0
    return False


def growth_bytes(span: Any, pool: KVPool) -> int:
    """How much less memory is free after everything was captured three times more, as by moves."""
    capturing, free = Capturing(CudaGraphs(DEVICE)), []
    for _ in range(4):
        captures = Captures([span], pool.kv, LIMITS, capturing, lambda failure: None)
        captures.capture_all()
        free.append(capturing.backend.free_bytes())
    return free[0] - free[-1]


@torch.inference_mode()
def compare(span: Any) -> dict[str, object]:
    pool, staging, graphs = make_pool(span), Staged(DEVICE, LIMITS.max_runs), KeptGraphs()
    items = asyncio.run(make_items(pool, torch.randn(len(STARTS), span.config.hidden_size, dtype=DTYPE)))
    batch = staging.build(items, pool, [])[0].ragged
    hidden = staging.bring([item.hidden for item in items])
    eager = span.forward_paged(SPAN, hidden, pool.kv, batch, ())
    captures = Captures([span], pool.kv, LIMITS, Capturing(graphs), lambda failure: None)
    captures.capture_all()
    graphed = GraphedSpan([(SPAN, span)], captures, NullObserver())
    whole = graphed.forward_paged(SPAN, hidden, pool.kv, batch, ())
    chain = hidden
    for block in SPAN:
        chain = graphed.forward_paged(BlockSpan(block, block + 1), chain, pool.kv, batch, ())
    return {
        "failure": captures.failure,
        "num_graphs": captures.num_graphs,
        "bytes": captures.nbytes,
        "kernels": kernels_of(graphs.graphs[0]) if graphs.graphs else None,
        "error": float((whole - eager).float().abs().max() / eager.float().abs().max()),
        "error_of_a_chain": float((chain - whole).float().abs().max() / whole.float().abs().max()),
        "recovers": recovers(),
        "growth": growth_bytes(span, pool),
        "arrives": bool(staging.fetch(whole).isfinite().all()),
    }


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        json.dump(compare(load(Path(directory), sys.argv[1])), sys.stdout)


if __name__ == "__main__":
    main()
