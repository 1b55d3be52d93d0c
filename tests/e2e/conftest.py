"""The real model, computed by transformers and served by real daemons on loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from petalsd.demo.__main__ import NUM_BLOCKS, START_TIMEOUT_S, Daemons
from petalsd.types import BlockSpan

# Daemons measure for seconds how fast their machine is; only where that is shown does it matter.
MEASURE_NOTHING = {"PETALSD_SWARM__THROUGHPUT": "10"}
# With room on the disk one more session could always have all the memory, so the free cache would not tell whether
# another holds some.
IN_MEMORY_ONLY = {"PETALSD_ENGINE__KV_SPILL_BYTES": "0"}
FIRST_HALF = BlockSpan(0, NUM_BLOCKS // 2)
SECOND_HALF = BlockSpan(NUM_BLOCKS // 2, NUM_BLOCKS)


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> PreTrainedModel:
    """The same model in one process, float32."""
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[torch.Tensor]:
    """Token ids ``[1, n]`` of eight questions of different length."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    subjects = (
        "rain",
        "the sea",
        "a clock",
        "iron",
        "a long winter",
        "music",
        "bread and butter",
        "the night sky",
    )
    texts = [f"Write {3 + i} words about {subject}." for i, subject in enumerate(subjects)]
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def daemons(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with contextlib.ExitStack() as stack:
        environ = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in (MEASURE_NOTHING | IN_MEMORY_ONLY).items():
            environ.setenv(name, value)
        yield Daemons(demo_model, tmp_path_factory.mktemp("daemons"), stack)


@pytest.fixture(scope="module")
def swarm(daemons: Daemons) -> list[str]:
    """Two daemons, half of the blocks each; the address of the first."""
    first = daemons.start("first", FIRST_HALF, [])
    maddrs: list[str] = first.wait_for("joined", START_TIMEOUT_S)["maddrs"]
    second = daemons.start("second", SECOND_HALF, maddrs)
    for daemon in (first, second):
        daemon.wait_for("online", START_TIMEOUT_S)
    return maddrs
