"""What hangs or dies is noticed within the watchdog's interval, healed, and named in the journal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.systemd.clients import PROMPT, connect, generate, greedy
from tests.systemd.conftest import MODEL, Figure, MakeInstance
from tests.systemd.instances import Instance, maddr_of
from tests.systemd.journal import Entry
from tests.systemd.lab import Lab

pytestmark = [pytest.mark.systemd, pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(180)]

INTERVAL_S = 6.0  # WatchdogSec=
# What systemd and a loaded machine add to the interval before the line is in the journal.
SLACK_S = 3.0
P2PD_NOTICED_S = 10.0  # docs/operate.md: asked every 5 s, to answer within 5 s
TOKEN_S = 0.025  # the tests' device: 1 token in 25 ms, so that 400 take longer than the interval


@pytest.fixture(scope="module")
def victim(instance: MakeInstance) -> Iterator[Instance]:
    victim = instance("victim")
    victim.configure(MODEL)
    victim.run_faulty(INTERVAL_S, FAULTY_TOKEN_S=str(TOKEN_S))
    victim.start()
    yield victim
    victim.stop()


@pytest.fixture
def serves_again(
    victim: Instance, tiny: PreTrainedModel, tiny_path: Path, figure: Figure, request: pytest.FixtureRequest
) -> Iterator[None]:
    """After the test: the victim serves under the PeerID that it had."""
    peer = victim.ctl("status")["peer_id"]
    since_s = victim.journal.mark()
    yield
    online = victim.online(since_s)
    assert online["peer_id"] == peer
    figure(f"{request.node.name}: serving again after", online.monotonic_s - since_s)
    assert generate(tiny_path, maddr_of(online), 4) == greedy(tiny, PROMPT, 4)


@pytest.fixture
def restarted(victim: Instance, serves_again: None) -> Iterator[None]:
    """After the test: systemd has ended the daemon for its watchdog's sake and started another one."""
    pid, since_s = victim.pid, victim.journal.mark()
    yield
    victim.text("Failed with result 'watchdog'", since_s)
    victim.online(since_s)
    assert victim.pid != pid


def noticed(figure: Figure, what: str, entry: Entry, since_s: float, within_s: float = INTERVAL_S) -> None:
    after_s = entry.monotonic_s - since_s
    figure(f"{what}: noticed after", after_s)
    assert after_s < within_s + SLACK_S


@pytest.mark.usefixtures("restarted")
def test_a_stopped_process(victim: Instance, figure: Figure) -> None:
    """SIGSTOP: nothing of the daemon runs any more, so systemd says it."""
    since_s = victim.signal("SIGSTOP")
    noticed(figure, "SIGSTOP", victim.text("Watchdog timeout", since_s), since_s)


@pytest.mark.usefixtures("restarted")
def test_a_blocked_engine_thread(victim: Instance, figure: Figure) -> None:
    """The canary does not come back: the daemon says where the thread stands and asks to be restarted at once."""
    since_s = victim.signal("SIGUSR2")
    stuck = victim.event("engine_stuck", since_s)
    noticed(figure, "blocked engine thread", stuck, since_s)
    assert "faulty_petalsd.py" in stuck["places"]
    assert "compute_faultily" in stuck["places"]
    victim.event("warning_raised", since_s, code="engine_stuck")
    request = victim.text("Watchdog request", since_s)
    assert request.monotonic_s - stuck.monotonic_s < SLACK_S


@pytest.mark.usefixtures("restarted")
def test_a_blocked_loop(victim: Instance, figure: Figure) -> None:
    """A thread beside the loop says where it hangs; without a ping systemd ends the daemon."""
    since_s = victim.signal("SIGUSR1")
    stuck = victim.event("loop_stuck", since_s)
    figure("blocked loop: said after", stuck.monotonic_s - since_s)
    assert "block_loop" in stuck["places"]
    noticed(figure, "blocked loop", victim.text("Watchdog timeout", since_s), since_s)


@pytest.mark.nightly
@pytest.mark.usefixtures("restarted")
def test_an_interpreter_that_is_stuck_in_foreign_code(victim: Instance, figure: Figure) -> None:
    """No thread of Python runs; the stacks are written by the signal's handler in C."""
    since_s = victim.signal("SIGRTMIN+1")
    noticed(figure, "interpreter stuck in C", victim.text("Watchdog timeout", since_s), since_s)
    victim.text("Fatal Python error: Aborted", since_s)
    victim.text("keep_interpreter_lock", since_s)


@pytest.mark.usefixtures("serves_again")
def test_a_lost_device(victim: Instance, figure: Figure) -> None:
    """The error of the driver is named with its number, no session goes on, and a new process takes over."""
    pid, since_s = victim.pid, victim.signal("SIGRTMIN+2")
    lost = victim.event("device_lost", since_s)
    noticed(figure, "lost device", lost, since_s)
    assert (lost["error"], lost["number"]) == ("cudaErrorECCUncorrectable", "214")
    victim.text("status=74", since_s)
    victim.online(since_s)
    assert victim.pid != pid


@pytest.mark.nightly  # tests/daemon/test_serving.py does so without systemd
@pytest.mark.usefixtures("serves_again")
@pytest.mark.parametrize(
    ("blow", "reason"),
    [("KILL", "the libp2p daemon exited"), ("STOP", "the libp2p daemon did not answer within 5 s")],
)
def test_a_broken_p2pd(lab: Lab, victim: Instance, figure: Figure, blow: str, reason: str) -> None:
    """Dead or stopped, it is replaced under the same identity by the same process, and the record is back."""
    pid, child, since_s = victim.pid, victim.p2pd_pid, victim.journal.mark()
    lab.run(["kill", f"-{blow}", str(child)])
    raised = victim.event("warning_raised", since_s, code="p2pd_failed")
    noticed(figure, f"p2pd, SIG{blow}", raised, since_s, P2PD_NOTICED_S)
    assert raised["detail"] == reason
    victim.event("warning_cleared", since_s, code="p2pd_failed")
    assert victim.pid == pid
    assert victim.p2pd_pid != child
    assert victim.warnings() == {}


def test_a_prefill_longer_than_the_interval_is_not_killed(
    victim: Instance, tiny: PreTrainedModel, tiny_path: Path, figure: Figure
) -> None:
    """One batch keeps the device busy for longer than systemd waits; it is work, and comes to its end."""
    prompt = torch.arange(400).remainder(250).unsqueeze(0)
    pid, peer = victim.pid, victim.ctl("status")
    with connect(tiny_path, peer["maddrs"][0]) as client:
        began_s = time.monotonic()
        tokens = greedy(client, prompt, 1)
        took_s = time.monotonic() - began_s
    figure("prefill of 400 tokens", took_s)
    assert took_s > INTERVAL_S + SLACK_S
    assert tokens == greedy(tiny, prompt, 1)
    assert victim.pid == pid
    assert victim.warnings() == {}
