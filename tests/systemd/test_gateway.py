"""The example unit of a gateway under a real systemd: ready when it answers, watched, stopped in order."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.systemd.clients import PROMPT, greedy
from tests.systemd.conftest import MODEL
from tests.systemd.instances import Instance, maddr_of
from tests.systemd.journal import Journal
from tests.systemd.lab import Lab

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.swarm,
    pytest.mark.slow,
    pytest.mark.nightly,  # daily the unit is read by systemd-analyze, and the command's life is tested without it
    pytest.mark.timeout(180),
]

UNIT = "petalsd-gateway.service"
EXAMPLE = Path(__file__).parents[2] / "packaging" / "examples" / UNIT
WATCHED = "[Service]\nWatchdogSec=3s\nRestartSec=100ms\nEnvironment=OMP_NUM_THREADS=1\n"


@pytest.fixture(scope="module")
def gateway(lab: Lab, demo: Instance) -> Iterator[Lab]:
    """The unit as its reader would put it there, with his model and his peers; not started."""
    unit = EXAMPLE.read_text()
    for option, value in {"--model": MODEL, "--peers": maddr_of(demo.start())}.items():
        unit, count = re.subn(rf"({option}) \S+", rf"\1 {value}", unit)
        assert count == 1
    lab.write(f"/etc/systemd/system/{UNIT}", unit)
    lab.write(f"/etc/systemd/system/{UNIT}.d/watched.conf", WATCHED)
    lab.systemctl("daemon-reload")
    yield lab
    lab.systemctl("stop", UNIT)


def complete(prompt: str) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["choices"][0]["text"])


@pytest.fixture(scope="module")
def expected(tiny: PreTrainedModel) -> list[str]:
    return [f"w{token}" for token in greedy(tiny, PROMPT, 8)]


def test_start_returns_when_requests_are_taken(gateway: Lab, expected: list[str]) -> None:
    gateway.systemctl("start", UNIT)
    assert complete("w5 w9 w17 w3").split() == expected
    shown = gateway.show(UNIT, "DynamicUser", "SubState", "NRestarts")
    assert shown == {"DynamicUser": "yes", "SubState": "running", "NRestarts": "0"}


def test_one_that_hangs_is_started_again(gateway: Lab, journal: Journal, expected: list[str]) -> None:
    since_s = journal.mark()
    gateway.systemctl("kill", "--kill-whom=main", "--signal=STOP", UNIT)
    journal.text(UNIT, "Watchdog timeout", since_s, 30.0)
    journal.text(UNIT, f"Started {UNIT}", since_s, 60.0)
    assert complete("w5 w9 w17 w3").split() == expected


def test_a_stop_is_a_success(gateway: Lab) -> None:
    gateway.systemctl("stop", UNIT)
    shown = gateway.show(UNIT, "Result", "ExecMainStatus", "ActiveState")
    assert shown == {"Result": "success", "ExecMainStatus": "0", "ActiveState": "inactive"}
