"""petalsctl stays light: what a verb may import, for an answer takes a blink."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from petalsd.cli.petalsctl.main import VERBS
from tests.cli.petalsctl.documents import PEERS, PLAN, PROGRESS, SESSIONS, STATUS
from tests.cli.petalsctl.fake_daemon import HANG_UP, FakeDaemon, lines

HEAVY = {
    "torch",
    "transformers",
    "hivemind",
    "aiohttp",
    "pydantic",
    "rich",
    "structlog",
    "asyncio",
    "numpy",
    "uvloop",
}
LIGHT_VERBS = [verb.name for verb in VERBS if verb.name not in ("generate", "doctor")]


@pytest.mark.parametrize("verb", LIGHT_VERBS)
def test_light_verbs_load_nothing_heavy(verb: str, daemon: FakeDaemon) -> None:
    """Neither to parse their arguments nor to show an answer."""
    done = {**PROGRESS, "done": True}
    daemon.answers |= {
        "GET /v1/status": STATUS, "GET /v1/sessions": SESSIONS, "GET /v1/peers": PEERS,
        "GET /metrics": {}, "GET /v1/version": {"version": "1"}, "POST /v1/drain": lines(done),
        "POST /v1/resume": {}, "POST /v1/rebalance": PLAN, "POST /v1/reload": {"applied": [], "needs_restart": []},
    }  # fmt: skip
    words = ["--socket", str(daemon.path), verb, *(["--wait"] if verb == "drain" else [])]
    program = (
        "import sys\nfrom petalsd.cli.petalsctl.main import main\n"
        f"status = main({words!r})\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'loads {heavy}' if heavy else status)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_traceback(daemon: FakeDaemon, unbuffered: str) -> None:
    """petalsctl metrics | head -1, however Python was told to write."""
    text = b"petalsd_up 1\n" * 200_000
    daemon.answers["GET /metrics"] = lambda: (200, text)
    command = [sys.executable, "-m", "petalsd.cli.petalsctl.main", "--socket", str(daemon.path), "metrics"]
    environ = {"PATH": "/usr/bin", "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.wait(20) == 141


@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["metrics"]])
def test_an_output_that_cannot_be_written_says_nothing_of_the_daemon(
    words: list[str], daemon: FakeDaemon
) -> None:
    """petalsctl status > file, on a full disk: 1 would mean that it does not serve."""
    daemon.answers |= {"GET /v1/status": STATUS, "GET /metrics": lambda: (200, b"petalsd_up 1\n")}
    command = [sys.executable, "-m", "petalsd.cli.petalsctl.main", "--socket", str(daemon.path), *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env={"PATH": "/usr/bin"}, stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == b"petalsctl: the output cannot be written: No space left on device\n"
    assert done.returncode == 4


@pytest.mark.parametrize(
    ("redirection", "status", "expected"),
    [
        (">&-", STATUS, 0),
        (">&- 2>&-", STATUS, 0),
        ("2>&-", None, 2),
        (">&- 2>&-", None, 2),
        ("2>/dev/full", None, 2),
    ],
)
def test_closed_streams_do_not_change_the_exit_status(
    redirection: str, status: object, expected: int, daemon: FakeDaemon
) -> None:
    """A script may want the exit status alone, and closes what it does not want to see."""
    daemon.answers["GET /v1/status"] = status or HANG_UP
    words = ["-m", "petalsd.cli.petalsctl.main", "--socket", str(daemon.path), "status"]
    command = f"exec {shlex.join([sys.executable, *words])} {redirection}"
    done = subprocess.run(["sh", "-c", command], env={"PATH": "/usr/bin"}, capture_output=True)
    assert done.returncode == expected
    assert b"Traceback" not in done.stderr


def test_an_error_that_cannot_be_written_as_a_document() -> None:
    """petalsctl status --json > file: the sentence stands on standard error, without a traceback."""
    words = ["--socket", "/nonexistent", "status", "--json"]
    command = [sys.executable, "-m", "petalsd.cli.petalsctl.main", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env={"PATH": "/usr/bin"}, stdout=full, stderr=subprocess.PIPE)
    assert b"is not running" in done.stderr and b"Traceback" not in done.stderr
    assert done.returncode == 4
