"""Adapters beside the model: stock clients and ours ask for one by name, and get what the merged model gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from petalsd.client.options import ClientOptions
from petalsd.errors import MissingBlocks
from petalsd.types import BlockSpan
from tests.adapter_files import draw_adapter, merge, write_adapter
from tests.interop.clients import connect, stock_greedy_ids, stock_pass
from tests.interop.daemon import DaemonOptions, ForkedDaemon, petalsd_daemon
from tests.interop.models import PROMPT, Model
from tests.interop.reference import assert_same_pass, greedy_ids, random_inputs, run_pass
from tests.interop.stock import StockClient

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.timeout(300)]
ADAPTERS = {"poet": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"], "cook": ["mlp.gate_proj"]}


@dataclass
class Swarm:
    """``models``: the tiny one with each adapter merged into it."""

    models: dict[str | None, Model]
    peers: list[str]


@pytest.fixture(scope="module")
def swarm(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Both servers have both adapters."""
    directory = tmp_path_factory.mktemp("adapters")
    models: dict[str | None, Model] = {None: tiny}
    for seed, (name, modules) in enumerate(ADAPTERS.items()):
        places = [f"model.layers.{i}.{module}" for i in range(tiny.num_blocks) for module in modules]
        tensors = draw_adapter(tiny.local, places, seed=seed)
        write_adapter(directory / name, tensors)
        models[name] = Model(
            tiny.directory, tiny.petals_directory, copy.deepcopy(tiny.local), tiny.dht_prefix
        )
        merge(models[name].local, tensors)
    adapters = [str(directory / name) for name in ADAPTERS]
    with (
        daemon(tiny, directory / "lower", BlockSpan(0, 3), adapters) as peers,
        daemon(tiny, directory / "upper", BlockSpan(1, 4), adapters, peers) as more,
    ):
        yield Swarm(models, peers + more)


@contextmanager
def daemon(
    model: Model,
    directory: Path,
    span: BlockSpan,
    adapters: list[str],
    initial_peers: list[str] | None = None,
) -> Iterator[list[str]]:
    others = {"model": {"adapters": adapters}}
    options = DaemonOptions(
        model.directory, directory, model.dht_prefix, span, initial_peers or [], others=others
    )
    with petalsd_daemon(options, ForkedDaemon) as maddrs:
        yield maddrs


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_the_stock_client(
    swarm: Swarm, stock_client: StockClient, tmp_path: Path, adapter: str | None
) -> None:
    """Tokens, and gradients through the adapter."""
    model = swarm.models[adapter]
    settings = {} if adapter is None else {"active_adapter": adapter}
    ids = stock_greedy_ids(stock_client, model, swarm.peers, [PROMPT], 12, **settings)
    assert ids == greedy_ids(model.local, [PROMPT], 12)
    inputs = random_inputs(model.local, batch=2, tokens=5, prefix=2)
    result = stock_pass(stock_client, model, swarm.peers, inputs, tmp_path, **settings)
    assert_same_pass(result, run_pass(model.local, inputs))


def test_our_client(swarm: Swarm) -> None:
    """All at once over the same servers; one that nobody has is named."""
    ids = {}
    for adapter, model in swarm.models.items():
        with connect(model, swarm.peers, ClientOptions(adapter=adapter)) as remote:
            ids[adapter] = greedy_ids(remote, [PROMPT], 12)
        assert ids[adapter] == greedy_ids(model.local, [PROMPT], 12)
    assert len({str(tokens) for tokens in ids.values()}) == len(ids)
    options = ClientOptions(adapter="nobody's", recovery_timeout_s=0.1)
    with (
        connect(swarm.models[None], swarm.peers, options) as remote,
        pytest.raises(MissingBlocks, match=r"no server holds blocks 0:4 of .* with adapter nobody's"),
    ):
        greedy_ids(remote, [PROMPT], 1)
