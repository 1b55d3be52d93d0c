"""Measuring one block, and keeping the figures."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch

from petalsd.engine import throughput
from petalsd.engine.captures import Capturing
from petalsd.engine.observer import NullObserver
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.throughput import MEASURE_LIMITS, BlockRates, RateCache, measure, rate_key
from petalsd.errors import DeadlineExceeded, EngineError
from tests.engine.kernel_rig import Counter, KernelRunners, geometry_of
from tests.engine.recorded_graphs import ForgottenGraphs
from tests.engine.rig import CPU, HookedBlock, TinyModel

RATES = BlockRates(inference_rps=100.0, forward_rps=2000.0)
RUNNERS = RunnerFactory(CPU, 1, MEASURE_LIMITS, NullObserver())


async def no_measurement() -> BlockRates:
    raise AssertionError("measured although the figures are kept")


async def test_rates_are_per_block(llama: TinyModel) -> None:
    """A measurement gives two positive rates, counted through one block whatever the number of blocks."""
    rates = await measure({2: llama.blocks[2]}, llama.rope, RUNNERS)
    assert type(rates.inference_rps) is float
    assert type(rates.forward_rps) is float
    assert rates.forward_rps > rates.inference_rps > 0


async def test_a_block_is_measured_through_captured_steps_that_are_gone_afterwards(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the blocks that serve are captured; of one size of batch, the only one that a measurement has."""
    monkeypatch.setattr(throughput, "cache_geometry", lambda *args: geometry_of(llama, args[1]))  # a GPU's
    monkeypatch.setattr(throughput, "_BUDGET_S", 0.01)
    counter, graphs = Counter(), ForgottenGraphs()
    runners = KernelRunners(CPU, 1, MEASURE_LIMITS, counter, Capturing(graphs))
    rates = await measure({2: llama.blocks[2]}, llama.rope, runners)
    assert rates.inference_rps > 0
    assert counter.runs[True] >= 1 and counter.runs[False] == 0
    assert len(graphs.captured) == 1 and graphs.num_alive == 0


async def test_measuring_broken_blocks_raises(llama: TinyModel) -> None:
    """A block that cannot compute has no throughput: EngineError, and the engine of the measurement is gone."""

    def explode(hidden: torch.Tensor) -> None:
        raise RuntimeError("device lost")

    with pytest.raises(EngineError):
        await measure({0: HookedBlock(llama.blocks[0], explode)}, llama.rope, RUNNERS)


async def test_figures_are_measured_once(tmp_path: Path) -> None:
    """What was measured is kept in the file for later processes, each key by itself."""
    path = tmp_path / "throughput.json"

    async def measure_first() -> BlockRates:
        return RATES

    assert await RateCache(path).get_or_measure("a", measure_first, timeout_s=1) == RATES
    assert await RateCache(path).get_or_measure("a", no_measurement, timeout_s=1) == RATES
    with pytest.raises(AssertionError):
        await RateCache(path).get_or_measure("b", no_measurement, timeout_s=1)
    assert json.loads(path.read_text()) == {"a": {"inference_rps": 100.0, "forward_rps": 2000.0}}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"a": {"inference_rps": -1, "forward_rps": 1}}']
)
async def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: str) -> None:
    """A file that cannot be read is measured again and replaced."""
    path = tmp_path / "throughput.json"
    path.write_text(content)

    async def measure_again() -> BlockRates:
        return RATES

    assert await RateCache(path).get_or_measure("a", measure_again, timeout_s=1) == RATES
    assert await RateCache(path).get_or_measure("a", no_measurement, timeout_s=1) == RATES


@pytest.mark.parametrize("unwritable", ["throughput.json.partial", "throughput.json.lock"])
async def test_figures_that_cannot_be_kept_are_used_all_the_same(tmp_path: Path, unwritable: str) -> None:
    """As on a full disk: the next start measures again."""
    (tmp_path / unwritable).mkdir()

    async def measure_anew() -> BlockRates:
        return RATES

    path = tmp_path / "throughput.json"
    assert await RateCache(path).get_or_measure("a", measure_anew, timeout_s=1) == RATES


async def test_a_file_system_without_locks_keeps_figures_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of some networks: two processes may measure at once there, and both start."""

    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    async def measure_anew() -> BlockRates:
        return RATES

    monkeypatch.setattr(fcntl, "flock", flock)
    rates = RateCache(tmp_path / "throughput.json")
    assert await rates.get_or_measure("a", measure_anew, timeout_s=1) == RATES
    assert await rates.get_or_measure("a", no_measurement, timeout_s=1) == RATES


async def test_one_process_measures_at_a_time(tmp_path: Path) -> None:
    """While another holds the lock a measurement waits, up to its deadline, and then finds the other's figures."""
    path = tmp_path / "throughput.json"
    other = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(DeadlineExceeded):
        await RateCache(path).get_or_measure("a", no_measurement, timeout_s=0)
    waiting = asyncio.create_task(RateCache(path).get_or_measure("a", no_measurement, timeout_s=30))
    await asyncio.sleep(0)
    path.write_text('{"a": {"inference_rps": 100.0, "forward_rps": 2000.0}}')
    os.close(other)
    assert await waiting == RATES


def test_the_key_tells_apart_what_the_figures_depend_on() -> None:
    """Model, weights, device and threads make different keys."""
    base = rate_key("model", "float32", CPU, 1)
    others = {
        rate_key("other", "float32", CPU, 1),
        rate_key("model", "float32 with int8 weights", CPU, 1),
        rate_key("model", "float32", torch.device("mps"), 1),
        rate_key("model", "float32", CPU, 2),
    }
    assert len(others | {base}) == 5


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_nobody_may_publish(rate: float) -> None:
    """Rates are finite and greater than zero: others divide by them."""
    with pytest.raises(ValueError, match="finite"):
        BlockRates(rate, 1.0)
