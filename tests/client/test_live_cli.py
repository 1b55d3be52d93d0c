"""``petalsd generate`` against real servers: what it prints, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.client.live_server import PREFIX, LiveServer, in_threads
from tests.tiny_models import make_tiny, make_tokenizer

pytestmark = [pytest.mark.swarm, pytest.mark.slow]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny model with a tokenizer of 256 words."""
    path = tmp_path_factory.mktemp("tiny")
    return path, make_tiny("llama", path), make_tokenizer(path)


@pytest.fixture(scope="module")
def servers(tiny: tuple[Path, PreTrainedModel, object]) -> Iterator[list[LiveServer]]:
    with in_threads(tiny[0], "0:2", "2:4") as servers:
        yield servers


def start(path: Path, servers: list[LiveServer], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "petalsd.cli.main", "generate", "--model", str(path)]
    command += ["--dht-prefix", PREFIX, "--peers", servers[0].maddr, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(pid: int) -> list[int]:
    """Direct children, by /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def test_it_prints_the_continuation_and_the_rate(
    tiny: tuple[Path, PreTrainedModel, PreTrainedTokenizerFast], servers: list[LiveServer]
) -> None:
    """The text alone on standard output; tokens, seconds and rate on standard error."""
    path, reference, tokenizer = tiny
    process = start(path, servers, "w7 w99 w3", "--max-new-tokens", "12")
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    ids = tokenizer("w7 w99 w3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = reference.generate(ids, max_new_tokens=12, do_sample=False)[0, 3:]
    assert out.split() == tokenizer.decode(expected).split()
    assert "12 tokens in" in err and "tokens/s" in err


def test_settings_that_the_model_brings(
    tiny: tuple[Path, PreTrainedModel, PreTrainedTokenizerFast], servers: list[LiveServer]
) -> None:
    """Its beams cannot be printed as they come, and do not count."""
    path, reference, tokenizer = tiny
    ids = tokenizer("w7 w99 w3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = tokenizer.decode(
            reference.generate(ids, max_new_tokens=12, do_sample=False)[0, 3:]
        ).split()
    settings = path / "generation_config.json"
    before = settings.read_bytes()
    settings.write_text(json.dumps({"num_beams": 2}))
    try:
        out, err = start(path, servers, "w7 w99 w3", "--max-new-tokens", "12").communicate(timeout=110)
    finally:
        settings.write_bytes(before)
    assert out.split() == expected, err


def test_ctrl_c_stops_at_once_and_leaves_no_process(
    tiny: tuple[Path, PreTrainedModel, object], servers: list[LiveServer]
) -> None:
    """Exit code 130; the libp2p daemon is gone and the servers have their pages back."""
    process = start(tiny[0], servers, "w7 w99 w3", "--max-new-tokens", "400", "--log-level", "error")
    assert process.stdout is not None
    process.stdout.read(1)
    children = children_of(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
    assert all(server.pool.stats().sessions == 0 for server in servers)


def test_a_swarm_that_nobody_answers_in_is_a_clean_error(tiny: tuple[Path, PreTrainedModel, object]) -> None:
    """One line that names the peers, one that says what to do, and the exit code of a temporary failure."""
    gone = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWM6STGwUcjCfYU3aPqW4LbDGheDM8oi95bAxwj2rY1A6M"
    command = [sys.executable, "-m", "petalsd.cli.main", "generate", "w1", "--model", str(tiny[0])]
    result = subprocess.run([*command, "--peers", gone], capture_output=True, text=True, timeout=110)
    assert result.returncode == 75
    assert gone in result.stderr and "Traceback" not in result.stderr
