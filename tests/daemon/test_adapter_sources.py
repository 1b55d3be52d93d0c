"""Adapters that a configuration names: what the plan makes of them, and how blocks are loaded with them."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from petalsd.config_loading import load_config
from petalsd.daemon.plan import ModelReader, ServingPlan, make_plan
from petalsd.errors import ConfigError, WeightsError
from petalsd.models.contract import with_adapter
from petalsd.models.ladder import Ladder
from petalsd.paths import InstancePaths
from tests.adapter_files import draw_adapter, write_adapter

Planner = Callable[..., ServingPlan]
NAMES = ("poet", "cook")


@pytest.fixture
def planner(model_dir: Path, tmp_path: Path) -> Planner:
    """Plans for a tiny model with the adapters at these places."""

    def plan(*places: Path) -> ServingPlan:
        listed = "[" + ", ".join(f'"{place}"' for place in places) + "]"
        overrides = [f"model.source={model_dir}", f"model.adapters={listed}", "engine.device=cpu"]
        return make_plan(load_config(None, {}, overrides).config, InstancePaths("t", tmp_path, tmp_path))

    return plan


@pytest.fixture
def places(model_dir: Path, tmp_path: Path) -> list[Path]:
    """Two adapters, of blocks 1 and 2."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return [
        write_adapter(
            tmp_path / name, draw_adapter(model, [f"model.layers.{block}.mlp.down_proj"], seed=block)
        )
        for block, name in enumerate(NAMES, start=1)
    ]


def test_adapters_are_named_and_counted(planner: Planner, places: list[Path]) -> None:
    """Each block may have terms of all of them."""
    plain, plan = planner(), planner(*places)
    assert (plain.adapter_names, plan.adapter_names) == ((), NAMES)
    taken = sum(adapter.max_block_nbytes(plan.dtype) for adapter in plan.adapters)
    assert plan.need.of_blocks(2) - plain.need.of_blocks(2) == pytest.approx(2 * taken, rel=0.05)
    assert plan.block_weights_bytes > plain.block_weights_bytes


def test_a_place_without_an_adapter_is_named(planner: Planner) -> None:
    """Whose key it is shows from its value: the model's source is another one."""
    with pytest.raises(WeightsError, match=r"^weights_error: '/no/such/adapter' is neither a directory here"):
        planner(Path("/no/such/adapter"))


def test_blocks_are_loaded_with_all_of_them(planner: Planner, places: list[Path]) -> None:
    """What an adapter leaves alone is not there twice, and nothing holds a block that was given up."""
    plan = planner(*places)
    ladder = Ladder(plan.architecture, plan.source, plan.storage, num_threads=1)
    reader = ModelReader(plan, ladder)
    blocks = [reader.load_block(index) for index in range(3)]
    assert all(tuple(block.adapted) == NAMES for block in blocks)
    changed = [[block.adapted[name] is not None for name in NAMES] for block in blocks]
    assert changed == [[False, False], [True, False], [False, True]]
    hidden = torch.randn(1, 3, plan.model.hidden_size).to(plan.dtype)
    answers = [with_adapter(blocks[1], name).forward_dense(hidden) for name in (None, *NAMES)]
    assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])
    kept = [weakref.ref(block) for block in blocks]
    blocks.clear()
    assert [one() for one in kept] == [None] * 3


def test_two_of_one_name_are_refused(planner: Planner, places: list[Path]) -> None:
    """With the name and what to do."""
    twin = Path(shutil.copytree(places[0], places[1] / "poet"))
    with pytest.raises(ConfigError, match="two are called poet") as caught:
        planner(places[0], twin)
    assert "rename" in caught.value.hint


def test_one_that_is_not_there_is_refused(planner: Planner, tmp_path: Path) -> None:
    """Before anything is loaded."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"adapter_config\.json"):
        planner(tmp_path / "empty")
