"""``petalsd gateway`` as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalsd.cli.exit_codes import EXIT_BAD_CONFIG, EXIT_OK
from petalsd.cli.main import main
from tests.client.live_server import PREFIX
from tests.gateway.conftest import Tiny

COMMAND = [sys.executable, "-m", "petalsd", "gateway"]
PEER = "/ip4/127.0.0.1/tcp/1/p2p/QmNQw7WLbyAtyuxmgNcNNgTbHpNJUXjbGWBjQjfwTUWaRZ"
BASE = ["gateway", "--model", "m", "--peers", PEER]


class Running:
    """A gateway of its own process; ``notify`` is where it speaks to systemd."""

    def __init__(self, tiny: Tiny, notify: socket.socket) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--model", str(tiny.path), "--peers", tiny.maddr, "--dht-prefix", PREFIX,
             "--listen", "127.0.0.1:0"],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"NOTIFY_SOCKET": notify.getsockname()},
        )  # fmt: skip

    def event(self, name: str) -> dict[str, object]:
        """The next line of the log that tells of it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if (found := json.loads(line))["event"] == name:
                return dict(found)
        raise AssertionError(f"it ended without {name}")

    def end(self) -> None:
        assert self.process.stderr is not None
        self.process.kill()
        self.process.wait(10)
        self.process.stderr.close()


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"{tmp_path}/n")
        notify.settimeout(60)
        yield notify


@pytest.fixture
def running(tiny: Tiny, notify: socket.socket) -> Iterator[Running]:
    running = Running(tiny, notify)
    yield running
    running.end()


@pytest.mark.swarm
@pytest.mark.timeout(120)
def test_a_stop_completes_the_answer_that_is_made(running: Running, notify: socket.socket) -> None:
    """It tells systemd when it can be asked, and ends with 0 when nobody is being answered."""
    (address,) = running.event("listening")["addresses"]  # type: ignore[misc]
    assert notify.recv(100) == b"READY=1"
    asked = {"prompt": "w7 w99", "max_tokens": 400, "stream": True, "temperature": 0}
    request = urllib.request.Request(
        f"http://{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        assert stream.readline().startswith(b"data: {")
        running.process.send_signal(signal.SIGTERM)
        rest = stream.read()
    assert rest.endswith(b"data: [DONE]\n\n") and rest.count(b"\n\n") > 400
    assert running.event("stopped")["cut_off"] == 0
    assert running.process.wait(30) == EXIT_OK


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--listen", "8000"], "an address is written host:port"),
        (["--max-answers", "0"], "'0' is no number of answers, 1 to 256"),
        (["--peers", "nowhere"], "--peers: a multiaddr is text as in"),
    ],
)
def test_wrong_usage(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Told without waiting for any library."""
    with pytest.raises(SystemExit):
        main([*BASE, *words])
    assert problem in capsys.readouterr().err


def test_a_file_of_keys_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--api-keys", "/no/such/file"]) == EXIT_BAD_CONFIG
    assert "--api-keys /no/such/file: No such file" in capsys.readouterr().err
