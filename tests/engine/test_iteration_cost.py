"""The cost model finds what a device takes, keeps it, and is not led astray by a wild measurement."""

from __future__ import annotations

import random

import pytest

from petalsd.engine.iteration_cost import AttentionShare, CostModel, Work
from petalsd.models.block_config import BlockConfig
from tests.engine.rig import TinyModel

READ_S, TOKEN_S = 0.0003, 0.00001
BLOCKS = 30.0


def seconds(work: Work) -> float:
    return READ_S * work.reads + TOKEN_S * work.tokens


def taught(num_tokens: list[int], noise: float = 0.0) -> CostModel:
    """A model that saw iterations of so many tokens."""
    model, source = CostModel(), random.Random(0)
    for tokens in num_tokens:
        work = Work(BLOCKS, BLOCKS * tokens)
        model.observe(work, seconds(work) * source.gauss(1.0, noise))
    return model


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_both_numbers_are_found(noise: float) -> None:
    """Iterations of two sizes tell them apart; what another size takes follows."""
    model = taught([16, 256] * 200, noise)
    for tokens in (1, 64, 1024):
        work = Work(BLOCKS, BLOCKS * tokens)
        assert model.seconds(work) == pytest.approx(seconds(work), rel=0.05 + 2 * noise)


def test_the_first_measurement_sets_the_scale() -> None:
    """One iteration is enough for the right order of magnitude."""
    work = Work(BLOCKS, BLOCKS * 64)
    assert taught([64]).seconds(work) == pytest.approx(seconds(work))


def test_what_was_learnt_outlives_a_long_time_of_one_size() -> None:
    """A thousand decode steps say nothing of prefill, and so do not change what is known of it."""
    model = taught([16, 256] * 200 + [1] * 1000)
    work = Work(BLOCKS, BLOCKS * 256)
    assert model.seconds(work) == pytest.approx(seconds(work), rel=0.1)


def test_one_wild_measurement_changes_little() -> None:
    """A machine that was busy elsewhere for a second does not make all chunks tiny."""
    model = taught([16, 256] * 200)
    work = Work(BLOCKS, BLOCKS * 64)
    model.observe(work, 1000 * seconds(work))
    assert model.seconds(work) <= 1.16 * seconds(work)
    for _ in range(10):
        model.observe(work, seconds(work))
    assert model.seconds(work) == pytest.approx(seconds(work), rel=0.02)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_device_that_changes_is_followed(factor: float) -> None:
    """Clocks change, neighbours come and go: some twenty iterations later it is known."""
    model = taught([16, 256] * 200)
    for tokens in [16, 256] * 20:
        work = Work(BLOCKS, BLOCKS * tokens)
        model.observe(work, factor * seconds(work))
    assert model.seconds(work) == pytest.approx(factor * seconds(work), rel=0.1)


@pytest.mark.parametrize("pair", [0.0, 0.0003, 0.01])
@pytest.mark.parametrize("context", [0, 5000])
def test_tokens_within_is_the_inverse_of_work(pair: float, context: int) -> None:
    """As many tokens as fit, and no more."""
    share = AttentionShare(pair=pair)
    for budget in (0.0, 100.0, 5000.0, 1e6):
        tokens = share.tokens_within(budget, 2, context, 30)
        assert share.work(2, tokens, context, 30).tokens <= budget * (1 + 1e-9)
        assert share.work(2, tokens + 1, context, 30).tokens > budget * (1 - 1e-9)


def test_the_share_of_attention_comes_from_the_shapes(llama: TinyModel) -> None:
    """Elements of keys and values, and products, against those of the block's matrices."""
    config: BlockConfig = llama.config
    weights = llama.blocks[0].weights
    elements = sum(t.num_out * t.num_in for t in (weights.qkv, weights.output, weights.gate_up, weights.down))
    share = AttentionShare.of(config)
    assert share.read * elements == pytest.approx(2 * config.num_kv_heads * config.head_dim)
    assert share.pair * elements == pytest.approx(2 * config.num_heads * config.head_dim)
