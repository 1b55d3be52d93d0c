"""What a server says of itself while it moves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from petalsd.config_loading import load_config
from petalsd.daemon.announcement import RecordWriter
from petalsd.daemon.plan import make_plan
from petalsd.daemon.speed import Rates, Speed
from petalsd.engine.engine import Engine
from petalsd.paths import InstancePaths
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan


async def test_a_part_of_a_span_is_as_fast_as_the_whole(model_dir: Path, tmp_path: Path) -> None:
    """A server that moves announces what stays and what comes apart; its device computes both."""
    overrides = [f"model.source={model_dir}", "engine.device=cpu"]
    plan = make_plan(load_config(None, {}, overrides).config, InstancePaths("t", tmp_path, tmp_path))
    speed = cast(Speed, SimpleNamespace(rates=Rates(None, 10.0, 100.0, 1e9, "served", "configured")))
    engine = cast(Engine, SimpleNamespace(span=BlockSpan(0, 3), pool=None))
    writer = RecordWriter(plan, engine, speed, None, lambda: None)
    parts = [(ServerState.ONLINE, BlockSpan(1, 3)), (ServerState.JOINING, BlockSpan(3, 4))]
    assert [writer.describe(*part, False).throughput for part in parts] == [50.0, 50.0]
