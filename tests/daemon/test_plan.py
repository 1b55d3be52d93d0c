"""What a configuration comes to on this machine, with a tiny model in a directory."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from petalsd.config import Config
from petalsd.config_loading import load_config
from petalsd.daemon.cache_room import cache_tokens
from petalsd.daemon.memory import device_memory_bytes
from petalsd.daemon.node_options import node_options
from petalsd.daemon.plan import (
    Demand,
    ModelReader,
    ServingPlan,
    choose_device,
    demand_for,
    make_plan,
    read_token,
    size_text,
)
from petalsd.daemon.sizing import MemoryNeed
from petalsd.errors import ConfigError
from petalsd.models.ladder import Ladder
from petalsd.ops.eight_bit_kv import FLOAT8
from petalsd.ops.packed_weight import PackedWeight
from petalsd.paths import InstancePaths
from petalsd.swarm.protocol import PUBLIC_INITIAL_PEERS
from petalsd.types import BlockSpan

PEER = "/ip4/10.0.0.7/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


def configured(model_dir: Path, *overrides: str) -> Config:
    return load_config(None, {}, [f"model.source={model_dir}", "engine.device=cpu", *overrides]).config


@pytest.fixture
def paths(tmp_path: Path) -> InstancePaths:
    return InstancePaths("t", tmp_path / "state", tmp_path / "cache")


@pytest.fixture
def plan(model_dir: Path, paths: InstancePaths) -> ServingPlan:
    return make_plan(configured(model_dir), paths)


def test_a_plan_says_what_is_served(model_dir: Path, plan: ServingPlan) -> None:
    """Name in the swarm, dtype by the rule of the reference, cache and limits by the model's query groups."""
    assert (plan.prefix, plan.repository, plan.dtype_name) == ("tiny-hf", None, "bfloat16")
    assert (plan.kv_tokens, plan.limits.max_session_tokens) == (16384, 8192)
    assert plan.memory_bytes > plan.need.of_blocks(plan.model.num_blocks)


def test_which_blocks_are_asked_for(model_dir: Path, plan: ServingPlan) -> None:
    """A span pins, a count leaves the choice to the swarm, all blocks leave none."""
    demands = {
        override: demand_for(plan, configured(model_dir, override).blocks)
        for override in ("blocks.span=1:3", "blocks.count=2", "blocks.count=99", "blocks.count=auto")
    }
    assert demands == {
        "blocks.span=1:3": Demand(2, BlockSpan(1, 3)),
        "blocks.count=2": Demand(2, None),
        "blocks.count=99": Demand(4, BlockSpan(0, 4)),
        "blocks.count=auto": Demand(4, BlockSpan(0, 4)),
    }


def test_auto_serves_as_many_blocks_as_fit(model_dir: Path, plan: ServingPlan) -> None:
    """The count follows the memory; when not even one block fits the error gives both figures."""
    blocks = configured(model_dir).blocks
    tight = replace(plan, need=MemoryNeed(block_bytes=2**30, reserve_bytes=2**30), memory_bytes=7 * 2**29)
    assert demand_for(tight, blocks) == Demand(2, None, may_be_fewer=True)
    with pytest.raises(ConfigError, match=r"one block takes 2\.0 GiB, there are 0\.5 GiB"):
        demand_for(replace(tight, memory_bytes=2**29), blocks)


@pytest.mark.parametrize(
    ("demand", "allowed"),
    [
        (Demand(2, None), ["0:2", "1:3"]),
        (Demand(2, None, may_be_fewer=True), ["0:1", "0:2", "1:3"]),
        (Demand(2, BlockSpan(1, 3)), ["1:3"]),
    ],
)
def test_what_a_demand_allows(demand: Demand, allowed: list[str]) -> None:
    """As many blocks as it says, fewer where the rule may choose, and only the named ones where they are named."""
    spans = [BlockSpan(0, 1), BlockSpan(0, 2), BlockSpan(1, 3), BlockSpan(0, 3)]
    assert [str(span) for span in spans if demand.allows(span)] == allowed


def test_blocks_are_read_for_the_plan(plan: ServingPlan) -> None:
    """The reader fetches a span's files and loads its blocks in the plan's dtype."""
    reader = ModelReader(plan, Ladder(plan.architecture, plan.source, plan.storage))
    reader.fetch(BlockSpan(1, 3), lambda file, done, total: None)
    block = reader.load_block(2)
    assert (block.index, block.dtype) == (2, torch.bfloat16)


def test_fewer_blocks_after_they_did_not_fit(model_dir: Path, paths: InstancePaths) -> None:
    """Of a named span the first ones; all blocks of a model become a part that may lie anywhere."""
    plan = make_plan(configured(model_dir), paths)
    total = plan.model.num_blocks
    demands = [
        demand_for(plan, configured(model_dir, f"blocks.{override}").blocks, most=1)
        for override in ("span=1:3", f"count={total}", "count=auto")
    ]
    assert demands == [Demand(1, BlockSpan(1, 2)), Demand(1, None), Demand(1, None, may_be_fewer=True)]


def test_what_a_gpu_has_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its whole memory: others may hold some of it, and what this process holds is ours again."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 30)
    assert device_memory_bytes(torch.device("cuda:0")) == 21 << 30


def test_quantization_makes_room_for_more_blocks(model_dir: Path, paths: InstancePaths) -> None:
    """Where two blocks of the model fit, four fit in int4; what is read is what was counted with."""
    fitting = {}
    for quantization in ("none", "int8", "int4"):
        config = configured(model_dir, f"model.quantization={quantization}", "engine.kv_tokens=16")
        plan = make_plan(config, paths)
        if quantization == "none":
            memory_bytes = plan.need.of_blocks(2)
        fitting[quantization] = demand_for(replace(plan, memory_bytes=memory_bytes), config.blocks).num_blocks
        block = ModelReader(plan, Ladder(plan.architecture, plan.source, plan.storage)).load_block(0)
        assert block.nbytes < plan.need.block_bytes
        assert isinstance(block.weights.down, PackedWeight)
        assert block.weights.down.format == plan.storage.format
    assert fitting == {"none": 2, "int8": 3, "int4": 4}


def test_graphs_are_for_gpus(model_dir: Path, paths: InstancePaths) -> None:
    """To ask for them on the CPU is an error; auto does without."""
    assert not make_plan(configured(model_dir), paths).has_graphs
    with pytest.raises(ConfigError, match=r"engine\.graphs = 'on': there are CUDA graphs on a GPU only"):
        make_plan(configured(model_dir, "engine.graphs=on"), paths)


def test_a_block_takes_its_memory_while_nothing_is_captured(plan: ServingPlan) -> None:
    turn = threading.Lock()
    ladder: Any = SimpleNamespace(load=lambda index: SimpleNamespace(is_in_turn=turn.locked()))
    block: Any = ModelReader(plan, ladder, turn).load_block(0)
    assert block.is_in_turn
    assert not turn.locked()


def test_a_cache_that_the_device_cannot_read_is_refused(model_dir: Path, paths: InstancePaths) -> None:
    """With the setting, its value and what serves instead."""
    with pytest.raises(ConfigError, match=r"engine\.kv_dtype = 'float8': .* not the CPU") as caught:
        make_plan(configured(model_dir, "engine.kv_dtype=float8"), paths)
    assert (caught.value.hint or "").startswith("set engine.kv_dtype to int8")


def test_the_form_names_what_speed_depends_on(model_dir: Path, paths: InstancePaths) -> None:
    """A cache of another precision is part of it; measured speeds are kept by it."""
    form = make_plan(configured(model_dir, "engine.kv_dtype=int8", "model.quantization=int4"), paths)
    assert form.form_name == "bfloat16 with int4 weights with int8 cache"
    float8 = replace(form.geometry, stored=FLOAT8)
    assert replace(form, geometry=float8).form_name == "bfloat16 with int4 weights with float8 cache"


def test_the_cache_leaves_room_for_graphs_and_passes(plan: ServingPlan) -> None:
    """It is as large as planned where that fits, and never too small for the longest session."""
    plan = replace(plan, need=MemoryNeed(block_bytes=0, reserve_bytes=1 << 20))
    block_bytes = plan.kv_tokens // plan.geometry.page_tokens * plan.geometry.page_bytes
    page_0 = plan.geometry.page_bytes
    assert cache_tokens(plan, 2, 2 * block_bytes + page_0 + (1 << 20)) == plan.kv_tokens
    assert cache_tokens(plan, 2, 2 * block_bytes + (1 << 20)) == plan.kv_tokens - plan.geometry.page_tokens
    assert cache_tokens(plan, 2, 0) == plan.limits.max_session_tokens


@pytest.mark.parametrize(("count", "auto"), [(0, "cpu"), (1, "cuda:0")])
def test_a_device_that_is_not_there_is_refused(
    count: int, auto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the setting and what torch sees; auto never fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if count else None)
    with pytest.raises(ConfigError, match=rf"engine\.device = 'cuda:64': torch .* sees {count} CUDA devices"):
        choose_device("cuda:64")
    assert choose_device("auto") == torch.device(auto)


def test_the_token_is_read_from_its_file(model_dir: Path, paths: InstancePaths, tmp_path: Path) -> None:
    """A file with anything but one word in it is no token file."""
    file = tmp_path / "token"
    file.write_text("two words\n")
    with pytest.raises(ConfigError, match="holds no token"):
        make_plan(configured(model_dir, f"model.token_file={file}"), paths)
    file.write_text("hf_secret\n")
    make_plan(configured(model_dir, f"model.token_file={file}"), paths)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="holds no token: it is not text"):
        make_plan(configured(model_dir, f"model.token_file={file}"), paths)


def test_the_token_may_be_a_credential_of_the_service(tmp_path: Path) -> None:
    """credential:NAME is looked for where the service manager keeps this service's secrets, and nowhere else."""
    setting = configured(tmp_path, "model.token_file=credential:hub-token").model.token_file
    with pytest.raises(ConfigError, match=r"credential:hub-token: no credentials were passed"):
        read_token(setting, None)
    with pytest.raises(ConfigError, match=r"credential:hub-token: No such file") as caught:
        read_token(setting, tmp_path)
    assert caught.value.hint == "LoadCredential=hub-token:FILE in the service's unit passes it"
    (tmp_path / "hub-token").write_text("hf_secret\n")
    assert read_token(setting, tmp_path) == "hf_secret"
    with pytest.raises(ConfigError, match="write credential:NAME"):
        read_token(Path("credential:../hub-token"), tmp_path / "below")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"initial_peers": (), "use_relay": True, "use_auto_relay": True}),
        (["swarm.relay=false"], {"use_relay": False, "use_auto_relay": False}),
        (["swarm.initial_peers=public"], {"initial_peers": PUBLIC_INITIAL_PEERS}),
        ([f"swarm.initial_peers={PEER}"], {"initial_peers": (PEER,)}),
        (["swarm.host_maddrs=/ip4/127.0.0.1/tcp/0,/ip6/::1/tcp/0"], {"use_auto_relay": False}),
        (["swarm.host_maddrs=/ip4/127.0.0.1/tcp/0,/ip4/10.0.0.1/tcp/0"], {"use_auto_relay": True}),
        (["swarm.identity_path=/keys/a"], {"identity_path": Path("/keys/a"), "num_workers": 12}),
    ],
)
def test_how_the_node_joins(
    model_dir: Path, paths: InstancePaths, overrides: list[str], expected: dict[str, object]
) -> None:
    """The word public means the public list; a node on loopback alone looks for no relays."""
    options = node_options(configured(model_dir, *overrides).swarm, paths, num_blocks=12)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (500, "0.5 KiB"),
        (50, "50 B"),
        (12 << 20, "12.0 MiB"),
        (60 << 20, "0.1 GiB"),
        (3 << 29, "1.5 GiB"),
    ],
)
def test_no_size_reads_as_nothing_that_is_something(num_bytes: int, expected: str) -> None:
    assert size_text(num_bytes) == expected
