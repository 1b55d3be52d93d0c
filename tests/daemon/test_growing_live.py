"""A real daemon whose last block does not come at first: the others serve, and their sessions go on after that."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from petalsd.swarm.directory import read_view
from petalsd.swarm.node import Node
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan
from tests.daemon.processes import Launch
from tests.daemon.swarms import Member
from tests.daemon.test_control_live import Ctl
from tests.daemon.test_moving_live import PREFIX, a_round_more, decoders
from tests.daemon.test_moving_live import calls as calls_of
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_BLOCKS = 4


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A checkpoint with one file for each block."""
    path = tmp_path / "tiny"
    make_tiny("llama", path)
    whole = path / "model.safetensors"
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(whole).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"block-{part}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, path / file, {"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    whole.unlink()
    return path


async def announced(node: Node, peer: str) -> list[tuple[ServerState, str]]:
    view = await read_view(node, PREFIX, NUM_BLOCKS)
    records = [block[peer] for block in view.blocks]
    return [(record.state, str(record.span)) for record in records]


async def test_the_first_blocks_serve_before_the_last_is_there(
    launch: Launch, node: Node, model_dir: Path
) -> None:
    """What is announced is exact at each moment; a session of the first moment notices nothing."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    last = model_dir / "block-3.safetensors"
    last.rename(model_dir / "later")
    daemon = launch("slow", "blocks.span=0:4")
    await daemon.start()
    part = await daemon.event("part_online")
    assert (part["span"], part["goal"]) == ("0:3", "0:4")
    joined, opened = await daemon.event("joined"), await daemon.event("control_socket_open")
    member = Member(daemon, joined, Path(opened["path"]))
    assert await announced(node, member.peer) == [
        *[(ServerState.ONLINE, "0:3")] * 3, (ServerState.JOINING, "0:4")
    ]  # fmt: skip
    (decoder,) = decoders(node, member.peer, model, [BlockSpan(0, 2)])
    running = asyncio.create_task(decoder.run())
    await a_round_more([decoder])
    assert "0:4 of 4  0:3 online, 3 of 4" in await Ctl(member.socket)("status", status=1)
    (model_dir / "later").rename(last)
    assert (await daemon.online())["span"] == "0:4"
    assert await announced(node, member.peer) == [(ServerState.ONLINE, "0:4")] * 4
    await a_round_more([decoder])
    decoder.is_over.set()
    await running
    await decoder.session.close()
    calls = await calls_of(member)
    assert (calls["opened"], calls["failed"]) == (1, 0)
