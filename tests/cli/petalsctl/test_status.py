"""``petalsctl status``: what a person sees on a terminal, what a program gets, and the exit status."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.petalsctl.conftest import Ctl
from tests.cli.petalsctl.documents import STATUS, document, trial
from tests.cli.petalsctl.fake_daemon import FakeDaemon
from tests.cli.petalsctl.screen import TerminalCommand

OnTerminal = Callable[..., TerminalCommand]

ONLINE = """\
● demo is online for 3 h 12 min  petalsd 0.1.0, pid 4321, up 3 h 12 min
  model         HuggingFaceTB/SmolLM2-135M-Instruct  llama, bfloat16 on cpu
  computed by   fused blocks  avx2, error 9.8e-03, 2.9e-02 tolerated
  in the swarm  SmolLM2-135M-Instruct-hf
  blocks        ██████████░░░░░░░░░░ 0:15 of 30
  sessions      3 of 256, 4 sequences
  cache         █████░░░░░░░░░░░░░░░ 23 %, room for 12,600 tokens  7,680 pages
  on disk       512 pages of idle sessions  64.0 MiB of 2.1 GiB taken
  prompts       37,632 of 48,210 tokens reused  112.0 MiB of 700.0 MiB taken
  announced     251 tokens/s  network 10,851, assumed
                decode 2,138, passes 2,008 per block, measured on those served
  balance       next check in 12 s, quality 0.75
  watchdog      ping 12 s ago, limit 1 min; the engine's last step 0.4 s ago
  peer          12D3KooWGZ5SbcNYrwZkCMCXA3C3T3bQ3dJe6F4aJ6tVSwyF8ZcK
  listens on    /ip4/10.0.0.7/tcp/31337"""

LOADING = """\
● demo is loading for 12 s  petalsd 0.1.0, pid 4321, up 3 h 12 min
  loading       █████████░░░░░░░░░░░ 44 %, 1.2 GiB of 2.7 GiB
                fetching model-00002-of-00007.safetensors"""

DRAINING = """\
● demo is draining for 8 s  petalsd 0.1.0, pid 4321, up 3 h 12 min
  because       asked for on the control socket
  drain         2 sessions left, at most 52 s"""

WARNINGS = """\

! The swarm does not list this server  record_missing, 2 min 10 s
  it is announced again; if this stays, check that the initial peers can be
  reached

✗ The disk of the cache is full  disk_full, 3 s
  df -h /var/cache/petalsd"""


def loading_status() -> dict[str, object]:
    loading = {
        "stage": "fetching", "item": "model-00002-of-00007.safetensors", "done": 1288490188,
        "total": 2899102924, "unit": "bytes", "percent": 44.4,
    }  # fmt: skip
    return document(
        STATUS, state="loading", since_s=12.3, span=None, kv=None, throughput=None, loading=loading
    )


def test_the_readme_shows_what_is_printed() -> None:
    """Its example is this screen without the addresses."""
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    assert ONLINE.partition("\n  peer ")[0] in readme


def test_a_serving_daemon_on_a_terminal(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """All of it fits 80 columns and 24 lines, in colours; exit 0."""
    daemon.answers["GET /v1/status"] = STATUS
    command = on_terminal(daemon, "status")
    assert command.finish() == 0
    assert command.screen.text == ONLINE
    assert "1;32" in command.screen.styles


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        (loading_status(), LOADING),
        (
            document(
                STATUS, state="draining", since_s=8.0, reason="asked for on the control socket",
                drain={"deadline_left_s": 52.1, "sessions_left": 2, "abandoned": None},
            ),
            DRAINING,
        ),
    ],
    ids=["loading", "draining"],
)  # fmt: skip
def test_a_daemon_that_does_not_serve_now(
    changed: dict[str, object], start: str, daemon: FakeDaemon, ctl: Ctl
) -> None:
    """What it is busy with stands first; exit 1."""
    daemon.answers["GET /v1/status"] = changed
    status, out, _ = ctl("status")
    assert status == 1
    assert out.startswith(start + "\n")


def test_a_daemon_that_serves_its_first_blocks(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Exit 1: a client that needs the other blocks does not find them here yet."""
    daemon.answers["GET /v1/status"] = document(STATUS, state="loading", served_span={"start": 3, "end": 12})
    status, out, _ = ctl("status")
    assert status == 1
    assert " 0:15 of 30  3:12 online, 9 of 15\n" in out


def test_adapters_are_named(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Clients ask for them by these names."""
    model = {**STATUS["model"], "adapters": ["a/poet", "cook"]}
    daemon.answers["GET /v1/status"] = document(STATUS, model=model)
    _, out, _ = ctl("status")
    assert "  adapters      a/poet, cook\n" in out


def test_warnings_end_with_what_to_do(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """Each warning has its title, code, age and hint; long lines break between words."""
    hint = "it is announced again; if this stays, check that the initial peers can be reached"
    warnings = [
        {"code": "record_missing", "title": "The swarm does not list this server", "severity": "warning",
         "since_s": 130.0, "hint": hint},
        {"code": "disk_full", "title": "The disk of the cache is full", "severity": "critical",
         "since_s": 3.0, "hint": "df -h /var/cache/petalsd"},
    ]  # fmt: skip
    daemon.answers["GET /v1/status"] = document(STATUS, warnings=warnings)
    command = on_terminal(daemon, "status")
    assert command.finish() == 0
    assert command.screen.text == ONLINE + "\n" + WARNINGS


def test_each_kind_of_blocks_is_told_and_what_was_rejected(daemon: FakeDaemon, ctl: Ctl) -> None:
    """A line for each kind; below it the ways that did not compute what they should, with their figures."""
    kinds = [
        {"kind": "full_attention", "trials": [trial("fused", "avx2", 0.25), trial("packed", "avx2", 3e-7)]},
        {
            "kind": "sliding_attention",
            "trials": [trial("fused", "avx2", None), trial("plain", "torch", 2e-7)],
        },
    ]
    model = {**STATUS["model"], "path": "plain", "kernels": "torch", "block_kinds": kinds}
    daemon.answers["GET /v1/status"] = document(STATUS, model=model)
    _, out, _ = ctl("status")
    assert (
        "  computed by   packed layers  avx2, error 3.0e-07, 1.0e-04 tolerated, full_attention\n"
        "                not fused blocks: error 2.5e-01, 1.0e-04 tolerated  avx2\n"
        "                plain layers  torch, error 2.0e-07, 1.0e-04 tolerated, sliding_attention\n"
        "                not fused blocks: error not finite, 1.0e-04 tolerated  avx2\n"
    ) in out


@pytest.mark.parametrize(
    ("captured", "failure", "told"),
    [
        (738, None, "738 captured  120.0 MiB"),
        (41, None, "41 of 738 captured  120.0 MiB"),
        (41, "MemoryError: 12 MiB", "41 of 738 captured, the rest failed  120.0 MiB"),
    ],
)
def test_captured_graphs_are_counted(
    daemon: FakeDaemon, ctl: Ctl, captured: int, failure: str | None, told: str
) -> None:
    """While new blocks are captured beside sessions it is said how far that is."""
    graphs = {"captured": captured, "wanted": 738, "memory_bytes": 120 << 20, "failure": failure}
    daemon.answers["GET /v1/status"] = document(STATUS, graphs=graphs)
    _, out, _ = ctl("status")
    assert f"  graphs        {told}\n" in out


def test_a_move_and_a_relay_are_told(daemon: FakeDaemon, ctl: Ctl) -> None:
    """The last move with its reason and age; pinned blocks never move; relays are slow, so they are named."""
    move = {
        "at_unix_s": time.time() - 3660, "from": {"start": 15, "end": 30}, "to": {"start": 0, "end": 15},
        "reason": "better balance",
    }  # fmt: skip
    balance = {"quality": 0.75, "next_check_s": None, "last_move": move, "is_pinned": True}
    daemon.answers["GET /v1/status"] = document(STATUS, balance=balance, is_relayed=True)
    _, out, _ = ctl("status")
    assert "last move     15:30 → 0:15, 1 h 1 min ago: better balance\n" in out
    assert "balance       never, the blocks are pinned\n" in out
    assert "reached       through relays only\n" in out


@pytest.mark.parametrize(
    ("span", "why"),
    [
        ({"start": 0, "end": 30}, "never, these are all blocks of the model"),
        ({"start": 0, "end": 29}, "never, the blocks are pinned"),
        (None, "never"),
    ],
)
def test_why_a_daemon_does_not_move(
    span: dict[str, int] | None, why: str, daemon: FakeDaemon, ctl: Ctl
) -> None:
    """A server that has room for all blocks pins none; before blocks are chosen nobody knows which it is."""
    balance = STATUS["balance"] | {"next_check_s": None, "is_pinned": True}
    changed = document(STATUS, balance=balance, span=span, served_span=span, kv=None)
    daemon.answers["GET /v1/status"] = changed
    assert f"  balance       {why}\n" in ctl("status")[1]


def test_quality_0_is_no_wait_for_a_check(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Checks go on, but none of them leads to a move."""
    daemon.answers["GET /v1/status"] = document(STATUS, balance=STATUS["balance"] | {"quality": 0.0})
    assert "  balance       never by itself, quality 0\n" in ctl("status")[1]


def test_json_is_what_the_daemon_sent(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Byte for byte, the option before or behind the verb; the exit status stays the state's."""
    body = json.dumps(loading_status(), separators=(",", ":"), ensure_ascii=False).encode()
    daemon.answers["GET /v1/status"] = lambda: (200, body)
    for words in (("--json", "status"), ("status", "--json")):
        assert ctl(*words) == (1, body.decode() + "\n", "")


def test_no_colours_where_they_are_not_wanted(daemon: FakeDaemon, on_terminal: OnTerminal, ctl: Ctl) -> None:
    """None with --no-color, with NO_COLOR, on a dumb terminal, or into a pipe."""
    daemon.answers["GET /v1/status"] = STATUS
    for words, environ in ((("--no-color",), {}), ((), {"NO_COLOR": "1"}), ((), {"TERM": "dumb"})):
        command = on_terminal(daemon, "status", *words, **environ)
        assert command.finish() == 0
        assert "\x1b" not in command.raw
    _, out, _ = ctl("status")
    assert out == ONLINE + "\n"


def test_names_cannot_drive_the_terminal(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """What does not print is replaced: control characters of strangers' names never reach the terminal."""
    daemon.answers["GET /v1/status"] = document(
        STATUS, reason="a\x1b]0;owned\x07b\u009bc\u202ed\n", state="drained"
    )
    command = on_terminal(daemon, "status")
    command.finish()
    assert "because       a�]0;owned�b�c�d�" in command.screen.text
    assert not {"\x07", "\u009b", "\u202e"} & set(command.raw)


def test_fields_of_a_later_version_do_no_harm(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Unknown fields are passed over; a missing one is named instead of a traceback."""
    daemon.answers["GET /v1/status"] = document(STATUS, phase_of_moon="full")
    assert ctl("status")[0] == 0
    changed = document(STATUS)
    del changed["sessions"]
    daemon.answers["GET /v1/status"] = changed
    status, _, err = ctl("status")
    assert status == 4
    assert "the answer of petalsd 0.1.0 is not understood (KeyError: 'sessions')" in err
    assert "--json" in err


def test_nonsense_is_no_traceback(daemon: FakeDaemon, ctl: Ctl) -> None:
    """An answer that is no JSON object is an error in one line."""
    for body in (b"<html>", b"[1]", b"\xff"):
        daemon.answers["GET /v1/status"] = lambda body=body: (200, body)
        status, out, err = ctl("status")
        assert (status, out) == (4, "")
        assert err.startswith("petalsctl: the daemon's answer is not ")
