"""petalsctl and a bootstrap node: what a person reads, and the verbs that mean nothing there."""

from __future__ import annotations

import argparse

import pytest

from petalsd.cli import generate
from tests.cli.petalsctl.conftest import Ctl
from tests.cli.petalsctl.documents import BOOTSTRAP_STATUS, SWARM
from tests.cli.petalsctl.fake_daemon import FakeDaemon
from tests.cli.petalsctl.test_status import OnTerminal

ONLINE = """\
● boot is online for 3 h 12 min  petalsd 0.1.0, pid 4321, up 3 h 12 min
  role      bootstrap  others join through it, and reach those behind a NAT
  knows     12 peers, 1 of 2 other bootstrap nodes
  keeps     3,400 keys of the directory
  watchdog  ping 12 s ago, limit 1 min
  reached   by others directly
  address   /ip4/192.0.2.7/tcp/31337/p2p/QmZRjeJbu1KXG6EfA1G7zXnad2JoYNQf6uQDjWAFuN7trL
"""


def test_status(daemon: FakeDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address stands there whole: others paste it into their files."""
    monkeypatch.setenv("COLUMNS", "120")
    daemon.answers["GET /v1/status"] = BOOTSTRAP_STATUS
    assert ctl("status") == (0, ONLINE, "")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"is_reachable": False}, "reached   not by others"),
        ({"is_reachable": None}, "reached   not known, nobody could be asked"),
        ({"initial_peers": {"total": 0, "known": 0}}, "12 peers, no other bootstrap node is configured"),
        ({"state": "starting", "reason": "p2pd died"}, "because   p2pd died"),
    ],
)
def test_what_is_not_as_usual(
    change: dict[str, object], text: str, daemon: FakeDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    daemon.answers["GET /v1/status"] = {**BOOTSTRAP_STATUS, **change}
    status, shown, _ = ctl("status")
    assert status == (1 if "state" in change else 0)
    assert text in shown


def test_wait_and_peers(daemon: FakeDaemon, ctl: Ctl) -> None:
    """It knows all models of the swarm; each has a table of its own."""
    daemon.answers |= {"GET /v1/status": BOOTSTRAP_STATUS, "GET /v1/peers": SWARM}
    assert ctl("wait", "--ready") == (0, "serving\n", "")
    status, shown, _ = ctl("peers")
    assert status == 0
    first, second = shown.split("\nother  1 block\n")
    assert first.startswith("SmolLM2-135M-Instruct-hf  https://huggingface.co/HuggingFaceTB/")
    assert "every block is served" in first
    assert "! nobody serves blocks 0:1" in second
    daemon.answers["GET /v1/peers"] = {**SWARM, "models": []}
    assert ctl("peers") == (0, "no server has announced a model\n", "")


def test_generate_needs_a_model(daemon: FakeDaemon, ctl: Ctl) -> None:
    """It can say where the swarm is, and not which model is meant."""
    daemon.answers["GET /v1/status"] = BOOTSTRAP_STATUS
    status, _, told = ctl("generate", "Hello")
    assert status == 4
    assert "this is a bootstrap node, which serves no model" in told
    assert "petalsctl generate PROMPT --model MODEL" in told


def test_generate_through_it(daemon: FakeDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model named, it tells the rest."""
    calls: list[argparse.Namespace] = []
    monkeypatch.setattr(generate, "run", lambda arguments: calls.append(arguments) or 0)
    daemon.answers["GET /v1/status"] = BOOTSTRAP_STATUS
    assert ctl("generate", "--model", "owner/model", "Hello")[0] == 0
    assert (calls[0].peers, calls[0].dht_prefix) == (BOOTSTRAP_STATUS["maddrs"], None)


def test_nobody_waits_for_a_drain(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Which would never come."""
    daemon.answers["GET /v1/status"] = BOOTSTRAP_STATUS
    status, _, told = ctl("wait", "--drained", "--timeout", "5")
    assert status == 4
    assert "never drained" in told


def test_the_address_is_whole_on_a_narrow_terminal(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """A line end and the spaces of an indentation in it would be pasted into the files of others."""
    maddr = BOOTSTRAP_STATUS["maddrs"][-1]
    daemon.answers["GET /v1/status"] = BOOTSTRAP_STATUS
    command = on_terminal(daemon, "status")
    assert command.finish() == 0
    assert maddr in command.raw
