"""``petalsctl generate``: the client of ``petalsd generate``, with what the running daemon tells."""

from __future__ import annotations

import argparse

import pytest

from petalsd.cli import generate
from tests.cli.petalsctl.conftest import Ctl
from tests.cli.petalsctl.documents import STATUS, document
from tests.cli.petalsctl.fake_daemon import FakeDaemon


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What the client was called with, instead of generating."""
    calls: list[argparse.Namespace] = []

    def run(arguments: argparse.Namespace) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(generate, "run", run)
    return calls


def test_the_daemon_tells_model_and_peers(
    daemon: FakeDaemon, asked: list[argparse.Namespace], ctl: Ctl
) -> None:
    """A prompt is all it takes; the name in the swarm is the daemon's."""
    daemon.answers["GET /v1/status"] = STATUS
    assert ctl("generate", "Hello", "--max-new-tokens", "5")[0] == 0
    (arguments,) = asked
    assert (arguments.prompt, arguments.max_new_tokens) == ("Hello", 5)
    assert arguments.model == STATUS["model"]["source"]
    assert arguments.peers == STATUS["maddrs"]
    assert arguments.dht_prefix == STATUS["model"]["dht_prefix"]


def test_what_is_given_is_not_asked(daemon: FakeDaemon, asked: list[argparse.Namespace], ctl: Ctl) -> None:
    """With both on the command line no daemon is needed."""
    assert ctl("generate", "--model", "owner/other", "Hello", "--peers", "/ip4/10.0.0.1/tcp/1/p2p/Qm")[0] == 0
    assert daemon.requests == []
    assert (asked[0].model, asked[0].dht_prefix) == ("owner/other", None)


def test_a_daemon_without_an_address_yet(
    daemon: FakeDaemon, asked: list[argparse.Namespace], ctl: Ctl
) -> None:
    """It has not joined: wait for it."""
    daemon.answers["GET /v1/status"] = document(STATUS, state="starting", maddrs=[], peer_id=None)
    status, _, err = ctl("generate", "Hello")
    assert status == 4
    assert "the daemon is starting and has no address yet\n  petalsctl wait --ready" in err
    assert asked == []
