"""Loads a model in a process of its own, uses it, and says what that took: one line of JSON.

    python -m benchmarks.memory_probe --model DIR --provider petalsd|transformers --format bfloat16 --sessions 32

A fresh process is the only one whose resident memory says what weights cost: an allocator keeps what others freed.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import ctypes
import json
import mmap
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.local_model import CPU, LocalModel, ReferenceModel
from benchmarks.quiet import quiet_libraries
from benchmarks.report import OURS, TRANSFORMERS
from benchmarks.suite.passes import our_pass, their_pass
from petalsd.engine.engine import Engine
from petalsd.engine.handle import Session
from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import SessionSpec, Step
from tests.tiny_models import make_tiny

LOADS = 3
SESSION_TOKENS = 256
PASS_TOKENS = 2
PAGE_BYTES = mmap.PAGESIZE


def main() -> None:
    parser = argparse.ArgumentParser(description="What loading and using a model takes in memory.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--provider", choices=(OURS, TRANSFORMERS), required=True)
    parser.add_argument("--format", required=True)
    parser.add_argument("--sessions", type=int, required=True)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)

    def probe(path: Path) -> dict[str, Any]:
        if options.provider == TRANSFORMERS:
            return probe_transformers(path, options.format)
        return asyncio.run(probe_petalsd(path, options.format, options.sessions))

    with tempfile.TemporaryDirectory() as directory:
        make_tiny("llama", Path(directory))
        probe(Path(directory))  # libraries take memory and time of their own when they are first used
    print(json.dumps(probe(options.model)))


async def probe_petalsd(path: Path, kind: str, num_sessions: int) -> dict[str, Any]:
    """Loaded, served by an engine, decoded with, and used for a backward pass; then with sessions.

    Pages of the cache that the first session got count for themselves: huge ones hold more than its tokens.
    """
    before = resident_bytes()
    model, load_s = timed(lambda: LocalModel(path, kind))
    pool = model.empty_pool((num_sessions + 1) * SESSION_TOKENS)
    engine = Engine(EngineLimits(), CPU, num_threads=1)
    await engine.start()
    try:
        await engine.load_span(model.blocks, pool, model.rope)
        await open_session(engine, model, "first")
        our_pass(model, torch.zeros(1, PASS_TOKENS, model.config.hidden_size, dtype=model.dtype), True)()
        loaded, first = resident_bytes(), sum(map(mapped_bytes, pool.kv.slabs))
        for number in range(num_sessions):
            await open_session(engine, model, f"peer {number}")
        session_bytes = (resident_bytes() - loaded) / num_sessions
    finally:
        await engine.stop(deadline_s=10.0)
    return {
        "load_s": [load_s, *(timed(lambda: LocalModel(path, kind))[1] for _ in range(LOADS - 1))],
        "model_bytes": model.model_bytes,
        "resident_bytes": loaded - before - first,
        "session_bytes": session_bytes,
        "session_kv_bytes": model.kv_bytes(1, SESSION_TOKENS),
    }


async def open_session(engine: Engine, model: LocalModel, peer: str) -> Session:
    """A session that holds SESSION_TOKENS tokens, the last of them decoded."""
    session = await engine.open_session(SessionSpec(model.span, 1, SESSION_TOKENS, peer))
    await session.step(Step(torch.zeros(1, SESSION_TOKENS - 1, model.config.hidden_size), 0))
    await session.step(Step(torch.zeros(1, 1, model.config.hidden_size), SESSION_TOKENS - 1))
    return session


def probe_transformers(path: Path, kind: str) -> dict[str, Any]:
    """Loaded, and used for a backward pass; with its embeddings, as far as it touches them."""
    before = resident_bytes()
    reference, load_s = timed(lambda: ReferenceModel(path, kind))
    hidden_size = reference.model.config.hidden_size
    their_pass(reference, torch.zeros(1, PASS_TOKENS, hidden_size, dtype=reference.dtype), True)()
    return {
        "load_s": [load_s, *(timed(lambda: ReferenceModel(path, kind))[1] for _ in range(LOADS - 1))],
        "resident_bytes": resident_bytes() - before,
    }


def mapped_bytes(tensor: torch.Tensor) -> int:
    """What the system has mapped of a tensor's memory, whole huge pages included."""
    start, end = tensor.data_ptr() // PAGE_BYTES, -(-(tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES)
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * start)
        entries = array.array("Q", pages.read(8 * (end - start)))
    return PAGE_BYTES * sum(entry >> 63 for entry in entries)


def timed(load: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return load(), time.perf_counter() - started


def resident_bytes() -> int:
    """Of this process: its own memory, and of the files that it maps those that hold weights.

    Without what the allocator keeps of buffers that were freed: beside small formats that is a lot.
    """
    ctypes.CDLL(None).malloc_trim(0)
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping; the file comes last
            counts = len(words) < 6 or words[5].startswith("[") or words[-1].endswith(".safetensors")
        elif counts and words[0] == "Rss:":
            total += int(words[1]) << 10
    return total


if __name__ == "__main__":
    main()
