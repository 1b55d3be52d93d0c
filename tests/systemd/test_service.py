"""The shipped unit under a real systemd: start, reload, restart, stop, several instances, credentials."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.models.fake_hub import FakeHub
from tests.systemd.clients import PROMPT, generate, greedy
from tests.systemd.conftest import MODEL, Figure, MakeInstance
from tests.systemd.instances import Instance, maddr_of
from tests.systemd.lab import Lab

pytestmark = [pytest.mark.systemd, pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(180)]


def test_start_returns_when_it_serves(
    lab: Lab, demo: Instance, tiny: PreTrainedModel, tiny_path: Path, figure: Figure
) -> None:
    """A client that is new to the swarm generates at once, and the status line says what is served."""
    began_s = time.monotonic()
    online = demo.start()
    figure("systemctl start", time.monotonic() - began_s)
    assert generate(tiny_path, maddr_of(online)) == greedy(tiny, PROMPT, 8)
    status = lab.systemctl("status", demo.unit).stdout
    assert f'Status: "Serving blocks 0:4 of 4 of {tiny_path.name}-hf: ' in status
    assert "Active: active (running)" in status


def test_petalsctl_finds_it_and_generates(
    lab: Lab, demo: Instance, tiny: PreTrainedModel, tiny_path: Path
) -> None:
    """The only instance needs no name; the model and the swarm are the daemon's."""
    done = lab.run(["petalsctl", "generate", "w5 w9 w17 w3", "--max-new-tokens", "8"])
    assert done.stdout.split() == [f"w{token}" for token in greedy(tiny, PROMPT, 8)]
    assert "8 tokens in " in done.stderr


def test_reload_restart_and_stop(
    lab: Lab, demo: Instance, tiny: PreTrainedModel, tiny_path: Path, figure: Figure
) -> None:
    """A reload is the same process, a restart a new one under the same PeerID, a stop ends it with success."""
    pid, since_s = demo.pid, demo.journal.mark()
    lab.systemctl("reload", demo.unit)
    demo.event("placement_unchanged", since_s)
    assert demo.pid == pid
    peer = demo.ctl("status")["peer_id"]
    lab.systemctl("restart", demo.unit)
    online = demo.online(since_s)
    assert demo.pid != pid
    assert online["peer_id"] == peer
    assert generate(tiny_path, maddr_of(online)) == greedy(tiny, PROMPT, 8)
    began_s = time.monotonic()
    demo.stop()
    figure("systemctl stop, idle", time.monotonic() - began_s)
    demo.event("state", began_s, new="stopped")  # systemctl returns before the journal has its last lines
    states = [event["new"] for event in demo.journal.entries(demo.unit, began_s) if event.event == "state"]
    assert states == ["draining", "drained", "stopping", "stopped"]
    assert (demo.show("Result"), demo.show("ExecMainStatus"), demo.show("ActiveState")) == (
        "success",
        "0",
        "inactive",
    )


def test_two_start_together_and_the_target_has_all_that_are_enabled(
    lab: Lab, instance: MakeInstance, tiny: PreTrainedModel, tiny_path: Path
) -> None:
    """Two instances at once, each with a socket, a state and an identity of its own; the target starts and stops
    those that are enabled.
    """
    pair = [instance("left"), instance("right")]
    since_s = pair[0].journal.mark()
    for one in pair:
        one.configure(MODEL)
    lab.systemctl("enable", *(one.unit for one in pair))
    lab.systemctl("start", *(one.unit for one in pair))
    onlines = [one.online(since_s) for one in pair]
    assert len({online["peer_id"] for online in onlines}) == 2
    for one, online in zip(pair, onlines, strict=True):
        assert one.ctl("status")["instance"] == one.name
        assert generate(tiny_path, maddr_of(online)) == greedy(tiny, PROMPT, 8)
    lab.systemctl("start", "petalsd.target")
    lab.systemctl("stop", "petalsd.target")
    for one in pair:
        one.text("Deactivated successfully", since_s)
    lab.systemctl("start", "petalsd.target")
    assert {one.show("ActiveState") for one in pair} <= {"activating", "active"}
    lab.systemctl("stop", "petalsd.target")  # says so to its instances, and does not wait for them
    assert {one.show("ActiveState") for one in pair} <= {"deactivating", "inactive"}
    lab.systemctl("stop", *(one.unit for one in pair))
    assert {one.show("ActiveState") for one in pair} == {"inactive"}


def test_a_bootstrap_node_is_an_instance_like_others(
    lab: Lab, instance: MakeInstance, tiny: PreTrainedModel, tiny_path: Path
) -> None:
    """The same unit: ready when others can join, watched, stopped in order. A server serves a swarm through it."""
    boot, server = instance("boot"), instance("joiner")
    boot.write_config('[daemon]\nrole = "bootstrap"\n[swarm]\nhost_maddrs = ["/ip4/127.0.0.1/tcp/31337"]\n')
    boot.drop_in("WatchdogSec=4s")
    since_s = boot.journal.mark()
    lab.systemctl("start", boot.unit)
    status = boot.ctl("status")
    assert (status["state"], status["role"], boot.show("ActiveState")) == ("online", "bootstrap", "active")
    assert "Bootstrap node: " in boot.show("StatusText")
    server.configure(MODEL, swarm={"initial_peers": status["maddrs"]})
    assert generate(tiny_path, maddr_of(server.start())) == greedy(tiny, PROMPT, 8)
    (model,) = boot.ctl("peers")["models"]
    assert model["uncovered"] == [] and len(model["peers"]) == 1
    assert boot.ctl("status")["watchdog"]["last_ping_s"] < 4
    assert boot.show("NRestarts") == "0"
    server.stop()
    boot.stop()
    boot.text("Deactivated successfully", since_s)
    assert (boot.show("Result"), boot.show("ExecMainStatus")) == ("success", "0")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ('[model]\nsource = "x"\n[blocks]\nspam = 3\n', "unknown key blocks.spam; did you mean blocks.span?"),
        (None, "there is no /etc/petalsd/"),
    ],
    ids=["wrong", "missing"],
)
def test_a_bad_configuration_is_not_tried_again(
    lab: Lab, instance: MakeInstance, config: str | None, sentence: str
) -> None:
    """Exit 78 with the sentence in the journal; systemd lets it be."""
    bad = instance(f"bad-{'no' if config is None else 'wrong'}-file")
    if config is not None:
        bad.write_config(config)
    since_s = bad.journal.mark()
    assert lab.systemctl("start", bad.unit, check=False).returncode != 0
    bad.text(sentence, since_s)
    bad.text("status=78", since_s)
    assert (bad.show("ActiveState"), bad.show("Result")) == ("failed", "exit-code")
    assert (bad.show("ExecMainStatus"), bad.show("NRestarts")) == ("78", "0")


def test_a_credential_reaches_the_daemon_and_no_child(
    lab: Lab, instance: MakeInstance, tiny_path: Path, tiny: PreTrainedModel
) -> None:
    """A private model is fetched with the token of LoadCredential=; p2pd sees neither it nor systemd's sockets."""
    hub = FakeHub(tiny_path, requires="hf_secret")
    hub.start()
    try:
        private = instance("private")
        lab.write("/etc/credstore/petalsd.private.hub-token", "hf_secret\n", mode=0o600)
        private.configure(hub.repository, model={"token_file": "credential:hub-token"})
        private.drop_in(f"Environment=HF_ENDPOINT={hub.endpoint}")
        online = private.start()
    finally:
        hub.stop()
    assert "model.safetensors" in hub.downloaded()
    environ = lab.path(f"/proc/{private.p2pd_pid}/environ").read_text()
    assert "PATH=" in environ
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY", "JOURNAL_STREAM"):
        assert f"{name}=" not in environ
    assert json.loads(online["maddrs"])
    assert "hf_secret" not in private.journal.tail(0.0)
    private.stop()
