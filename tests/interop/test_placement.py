"""The simulator's stock Petals against the published package: same swarm, same answers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.swarm_sim.petals_rule import best_start, should_move
from tests.interop import stock

pytestmark = pytest.mark.interop

WORKER = Path(__file__).resolve().parent / "petals_side" / "placement.py"
CASES = 60


def random_swarm(seed: int) -> dict[str, list[float]]:
    """Spans of a model of 8 to 40 blocks; sums of multiples of 1/64 do not depend on their order."""
    rng = np.random.default_rng(seed)
    blocks, servers = int(rng.choice([8, 24, 40])), int(rng.integers(2, 20))
    length = rng.integers(1, blocks // 2 if seed % 2 else blocks, servers)
    start = rng.integers(0, blocks - length + 1)
    rate = np.round(rng.lognormal(3, 1, servers) * 64 + 1) / 64
    return {
        "blocks": [blocks],
        "start": start.tolist(),
        "end": (start + length).tolist(),
        "rate": rate.tolist(),
    }


def test_our_stock_petals_decides_as_the_published_one() -> None:
    """The best start exactly; the move wherever the order in which others are imagined to move does not matter."""
    swarms = [random_swarm(seed) for seed in range(CASES)]
    done = subprocess.run(
        [str(stock.PYTHON), str(WORKER)], input=json.dumps(swarms), capture_output=True, text=True,
        timeout=stock.JOB_DEADLINE_S, env=stock.ENVIRONMENT, check=True,
    )  # fmt: skip
    answers = json.loads(done.stdout.splitlines()[-1])
    moved = 0
    for swarm, answer in zip(swarms, answers, strict=True):
        start, end = (np.array(swarm[name], np.int64) for name in ("start", "end"))
        rate, block = np.array(swarm["rate"]), np.arange(int(swarm["blocks"][0]))
        cover = (rate[:, None] * ((start[:, None] <= block) & (block < end[:, None]))).sum(0)
        assert best_start(cover, int(end[0] - start[0])) == answer["best"]
        bound = float(((end - start) * rate).sum()) / len(block)
        verdicts = {
            should_move((start, end, rate), 0, cover, 0.75, bound, np.random.default_rng(seed))
            for seed in range(4)
        }
        assert verdicts & set(answer["moves"]), swarm
        moved += True in verdicts
    assert 0 < moved < CASES
