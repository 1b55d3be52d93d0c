"""Bootstrap nodes on loopback: each can start first, they find each other, and others join through any of them."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from petalsd.errors import SwarmError
from petalsd.swarm.bootstrap import BootstrapNode, parse_models
from petalsd.swarm.identity import ensure_identity
from petalsd.swarm.node import DHTEntry, NodeOptions
from petalsd.swarm.protocol import MODELS_KEY, ServerState, make_uid
from petalsd.swarm.reachability import ReachabilityService, ask
from petalsd.swarm.record import ModelRecord, ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.servers import node

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWPPYTbCekn58DYPfnN3EpyNH2Y4LAnCUmRmTCwXsU74EX"


def options_of(directory: Path, *names: str) -> list[NodeOptions]:
    """Of nodes that all list all of them, themselves too, as one file for several machines would."""
    maddrs, options = [], []
    for name in names:
        key = directory / f"{name}.key"
        with socket.create_server(("127.0.0.1", 0)) as free:
            host = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"
        maddrs.append(f"{host}/p2p/{ensure_identity(key)}")
        options.append((host, key))
    return [
        NodeOptions(initial_peers=tuple(maddrs), host_maddrs=(host,), identity_path=key)
        for host, key in options
    ]


@contextlib.asynccontextmanager
async def bootstrap(options: NodeOptions) -> AsyncIterator[BootstrapNode]:
    started = BootstrapNode(options)
    await started.start()
    try:
        yield started
    finally:
        await started.stop()


@pytest.mark.swarm
async def test_each_may_start_first_and_all_become_one_swarm(tmp_path: Path) -> None:
    """What a server stores through one of them, a client reads through the other."""
    first_options, second_options = options_of(tmp_path, "first", "second")
    async with bootstrap(first_options) as first:
        assert not await first.is_in_touch()
        assert first.stats().initial_peers == 1  # its own address is none to dial
        assert first.stats().is_reachable is None
        async with (
            node(NodeOptions(initial_peers=tuple(first.known_maddrs))) as early,
            bootstrap(second_options) as second,
        ):
            assert await first.is_in_touch() and await second.is_in_touch()
            assert (first.stats().known_initial, second.stats().known_initial) == (1, 1)
            assert first.stats().is_reachable and second.stats().is_reachable
            assert second.stats().known_peers == 2  # the server that came before it, too
            expiration = time.time() + 60
            uids = [make_uid("m", block) for block in range(2)]
            record = ServerRecord(ServerState.ONLINE, 10.0, BlockSpan(0, 2)).to_wire()
            assert await early.store(uids, early.peer_id, record, expiration, 10) == []
            await early.store([MODELS_KEY], "m", ModelRecord(3, "a/b").to_wire(), expiration, 10)
            (model,) = await second.read_models()
            assert (model.repository, model.view.missing_blocks()) == ("a/b", [2])
            assert [remote.peer for remote in model.view.spans()] == [early.peer_id]
            assert math.isfinite((await second.pings([early.peer_id]))[early.peer_id])
            assert second.stats().stored_keys == 3
            await ReachabilityService(early).start()  # as servers have it, for whom others ask
            async with node(NodeOptions(initial_peers=tuple(second.known_maddrs))) as late:
                assert set(await late.get(uids, 10)) == set(uids)
                assert await ask(late.p2p, second._started.p2p.peer_id, early.p2p.peer_id, 10) is True


@pytest.mark.swarm
async def test_one_that_comes_back_is_found_again(tmp_path: Path) -> None:
    """Under its old identity and address; what it kept is handed to it by the others."""
    first_options, second_options = options_of(tmp_path, "first", "second")
    async with bootstrap(first_options) as first, bootstrap(second_options) as second:
        peer_id = first.peer_id
        await second._started.store(["key"], "subkey", 1, time.time() + 60, 10)
        await first.stop()
        with pytest.raises(SwarmError):
            await first.maddrs()
        assert first.stats().known_peers == 0
        await second.refresh()
        first._is_reachable = False  # as it was found before
        await first.start()
        assert first.stats().is_reachable
        assert first.peer_id == peer_id
        assert await first.is_in_touch() and await second.is_in_touch()
        assert (await first._started.get(["key"], 10))["key"]["subkey"].value == 1


@pytest.mark.swarm
async def test_nobody_who_answers_is_no_reason_not_to_be_there() -> None:
    async with bootstrap(NodeOptions(initial_peers=(NOBODY,))) as alone:
        assert not await alone.is_in_touch()
        await alone.refresh()
        assert await alone.read_models() == []
        assert alone.stats().known_initial == 0


def test_models_that_anyone_may_have_written() -> None:
    """Bad entries are left out, and so many are looked up as can be at once, the newest first."""

    def entry(value: object, age: float = 0) -> DHTEntry:
        return DHTEntry(value, 1000 - age)

    nested: list[object] = []
    for _ in range(1020):  # as deep as msgpack goes
        nested = [nested]
    good = ModelRecord(30, "owner/model")
    bad = {"text": "x", "none": None, "zero": {"num_blocks": 0}, "float": {"num_blocks": 1.5},
           "many": {"num_blocks": 10**6}, "flag": {"num_blocks": True}}  # fmt: skip
    entries: dict[object, DHTEntry] = {name: entry(value) for name, value in bad.items()}
    entries |= {name: entry(good.to_wire()) for name in ("good", 7, "", "x" * 300)}
    assert parse_models(entries) == {"good": good}
    (deep,) = parse_models({"nested": entry({"num_blocks": 1, "repository": nested})}).values()
    assert deep.repository is not None and len(deep.repository) <= 120
    flood = {f"m{number}": entry({"num_blocks": 1000}, age=number) for number in range(100)}
    assert list(parse_models(flood)) == ["m0", "m1", "m2", "m3"]
    small = {f"m{index:02}": entry({"num_blocks": 1}, age=index) for index in range(100)}
    assert list(parse_models(small)) == [f"m{index:02}" for index in range(64)]
