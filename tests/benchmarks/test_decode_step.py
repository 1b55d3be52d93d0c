"""The in-process benchmark of a decode step runs on any model, and counts the bytes that a step reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import decode_step
from tests.tiny_models import make_tiny


@pytest.fixture
def model(tmp_path: Path) -> decode_step.Model:
    make_tiny("llama", tmp_path)
    return decode_step.Model(tmp_path, torch.bfloat16)


def test_every_provider_is_timed(model: decode_step.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds and GB/s of transformers and of each tier, and the one is the other's inverse."""
    monkeypatch.setattr(decode_step, "ROUND_S", 0.01)
    threads = torch.get_num_threads()
    rows = decode_step.measure(model, 2, 17, threads, ["auto", "baseline"], "setting")
    assert [(row.provider, row.unit) for row in rows] == [
        (name, unit)
        for name in ("transformers", "petalsd, auto", "petalsd, baseline")
        for unit in ("ms", "GB/s")
    ]
    gigabytes = model.step_bytes(2, 17) / 1e9
    for milliseconds, speed in zip(rows[::2], rows[1::2], strict=True):
        assert speed.spread.p80 == pytest.approx(1e3 * gigabytes / milliseconds.spread.p20, rel=0.2)


def test_a_step_reads_weights_and_context(model: decode_step.Model) -> None:
    """Weights once, keys and values for each row."""
    config = model.config
    token_bytes = 2 * 2 * config.num_kv_heads * config.head_dim * config.num_blocks
    weights = sum(block.nbytes for block in model.blocks.values())
    assert model.step_bytes(3, 10) == weights + 30 * token_bytes
