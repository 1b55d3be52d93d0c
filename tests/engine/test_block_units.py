"""A block's forward and backward are the same however small the units are, rows that are cut included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petalsd.engine.block_units import LEAST_PART_TOKENS, Pace, backward_block, forward_block
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.models.block import TransformerBlock
from tests.engine.rig import HookedBlock, TinyModel, states
from tests.numeric import assert_close

TOKENS = 3 * LEAST_PART_TOKENS + 5
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
PACES = {"all rows": 1000.0, "two rows": 2.5 * TOKENS, "one row": TOKENS, "parts": 40.0, "least parts": 0.0}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransformerBlock]:
    """With and without a sliding window, shorter and longer than a part, and with rotary angles by row length."""
    full = TinyModel(tmp_path_factory.mktemp("full"))
    models = {"full": full}
    for name, window in (("short window", 7), ("long window", 50)):
        models[name] = TinyModel(
            tmp_path_factory.mktemp(f"window-{window}"), "mistral", sliding_window=window
        )
    return {name: model.blocks[1] for name, model in models.items()}


def pace_of(tokens: float) -> Pace:
    return Pace(AttentionShare(), tokens)


@pytest.mark.parametrize("kind", ["full", "short window", "long window"])
@pytest.mark.parametrize("tokens", PACES.values(), ids=PACES)
def test_forward_in_units(blocks: dict[str, TransformerBlock], kind: str, tokens: float) -> None:
    """Rows and parts of rows together are the block's own forward."""
    block, hidden = blocks[kind], states(3, TOKENS)
    out = torch.full_like(hidden, torch.nan)
    list(forward_block(block, hidden, out, pace_of(tokens)))
    assert_close(out, block.forward_dense(hidden), **TOLERANCE, what="states")


@pytest.mark.parametrize("kind", ["full", "short window", "long window"])
@pytest.mark.parametrize("tokens", PACES.values(), ids=PACES)
def test_backward_in_units(blocks: dict[str, TransformerBlock], kind: str, tokens: float) -> None:
    """Gradients of rows and parts of rows are those of one graph over all."""
    block, hidden, grad_out = blocks[kind], states(3, TOKENS), states(3, TOKENS, seed=1)
    leaf = hidden.clone().requires_grad_()
    block.forward_dense(leaf).backward(grad_out)
    assert leaf.grad is not None
    grad = torch.full_like(hidden, torch.nan)
    list(backward_block(block, hidden, grad_out, grad, pace_of(tokens)))
    assert_close(grad, leaf.grad, **TOLERANCE, what="gradient")


def test_units_are_no_larger_than_the_pace(blocks: dict[str, TransformerBlock]) -> None:
    """Each computes what the pace of its time says, and all of it together what there is."""
    hidden, pace = states(2, TOKENS), pace_of(40.0)
    works = []
    for unit in forward_block(blocks["full"], hidden, torch.empty_like(hidden), pace):
        assert unit.work is not None
        assert unit.work.tokens <= pace.tokens
        works.append(unit.work.tokens)
        pace.tokens += 10.0
    assert sum(works) == 2 * TOKENS
    assert works[0] == 40 < works[1]


def test_a_block_that_cannot_be_cut_takes_whole_rows(blocks: dict[str, TransformerBlock]) -> None:
    """The smallest unit is a row then."""
    hidden = states(3, TOKENS)
    seen: list[tuple[int, ...]] = []
    block = HookedBlock(blocks["full"], lambda states: seen.append(tuple(states.shape)))
    units = list(forward_block(block, hidden, torch.empty_like(hidden), pace_of(0.0)))
    assert len(units) == 3
    assert seen == [(1, TOKENS, hidden.shape[2])] * 3


def test_rows_that_depend_on_their_length_are_cut_right(tmp_path: Path) -> None:
    """Rotary angles of a row longer than the model was made for are those of the whole row in each part."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    block = TinyModel(tmp_path, rope_parameters=rope, max_position_embeddings=TOKENS // 2).blocks[0]
    assert block.rope.is_length_dependent
    hidden = states(1, TOKENS)
    out = torch.empty_like(hidden)
    list(forward_block(block, hidden, out, pace_of(0.0)))
    assert_close(out, block.forward_dense(hidden), **TOLERANCE, what="states")
