"""Verbs that change something: what is asked of the daemon, what a person reads, and how they end."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from petalsd.cli.petalsctl import connection
from tests.cli.petalsctl.conftest import Ctl
from tests.cli.petalsctl.documents import PEERS, PLAN, PROGRESS, SESSIONS, document
from tests.cli.petalsctl.fake_daemon import HANG_UP, Answer, FakeDaemon, lines, refusal
from tests.cli.petalsctl.test_status import OnTerminal

DRAINED = document(
    PROGRESS, state="drained", sessions_left=0, deadline_left_s=None, abandoned=0, done=True,
    outcome="no sessions are left",
)  # fmt: skip
SESSION_TABLE = """\
SESSION     CLIENT        BLOCKS  ROWS  TOKENS     OF  PAGES    AGE   IDLE
b7e2c…4e5f  …Gf7Qa2LxYpR  0:15       1   1,234  2,048  1,170   93 s  0.2 s
01          …6tVSwyF8ZcK  5:15       2      17    512     40  1.5 s   75 s
"""
PEER_TABLE = """\
BLOCKS  STATE    TOKENS/S  DECODE   PING  PEER          NAME                VERSION
0:15    online        123     987         …6tVSwyF8ZcK  (this one)          0.1.0
15:25   joining      98.5          23 ms  …Gf7Qa2LxYpR  a friend (relayed)  2.3.0.dev2

! nobody serves blocks 25:30
  clients cannot use the model until somebody does
"""
DRY_RUN = """\
it would move to blocks 15:30
  blocks 15:30 are the slowest of the swarm
  now       blocks 0:15
  weakest   blocks 15:22, 25:30
  first     …erverB from 0:15 to 10:25, …erverB from 0:15 to 10:25, …erverB from 0:15 to 10:25 and 2 more
  proposed  blocks 15:30
  gain      the swarm's weakest block from 41.0 to 123 tokens/s (3.01×), 8,240 tokens won
  cost      15 blocks to load, 0 kept, about 1 min 35 s, 1,200 tokens lost meanwhile
  sessions  3 would end, 0 go on
"""


def test_sessions(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.answers["GET /v1/sessions"] = SESSIONS
    assert ctl("sessions") == (0, SESSION_TABLE, "")
    daemon.answers["GET /v1/sessions"] = document(SESSIONS, sessions=[])
    assert ctl("sessions") == (0, "no sessions\n", "")


def test_peers(daemon: FakeDaemon, ctl: Ctl) -> None:
    """In the order of their blocks, then the blocks that nobody serves."""
    daemon.answers["GET /v1/peers"] = PEERS
    assert ctl("peers") == (0, PEER_TABLE, "")
    daemon.answers["GET /v1/peers"] = document(PEERS, uncovered=[])
    assert ctl("peers")[1].endswith("\n2 servers, every block is served\n")
    daemon.answers["GET /v1/peers"] = document(PEERS, peers=[PEERS["peers"][0] | {"is_ghost": True}])
    assert ctl("peers")[1].splitlines()[1].startswith("15:25   ghost ")


@pytest.mark.parametrize("verb", ["sessions", "peers"])
def test_tables_as_json(verb: str, daemon: FakeDaemon, ctl: Ctl) -> None:
    body = json.dumps(PEERS).encode()
    daemon.answers[f"GET /v1/{verb}"] = lambda: (200, body)
    assert ctl(verb, "--json") == (0, body.decode() + "\n", "")


def test_a_wide_table_is_cut_not_wrapped(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """Names of peers have no bound: rows stay rows."""
    peer = document(PEERS["peers"][0], public_name="漢字" * 50, version="9" * 50)
    daemon.answers["GET /v1/peers"] = document(PEERS, peers=[peer], uncovered=[])
    command = on_terminal(daemon, "peers")
    assert command.finish() == 0
    assert len(command.screen.text.splitlines()) == 4
    assert " 漢字漢字… (relayed) " in command.screen.text


def test_a_dry_run_tells_everything_and_changes_nothing(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.answers["POST /v1/rebalance"] = PLAN
    assert ctl("rebalance", "--dry-run", "--to", "15:30") == (0, DRY_RUN, "")
    assert daemon.requests == [("POST", "/v1/rebalance", {"to": "15:30", "dry_run": True, "wait": False})]


def test_rebalance(daemon: FakeDaemon, ctl: Ctl) -> None:
    """It moves, or it says why it stays."""
    daemon.answers["POST /v1/rebalance"] = PLAN
    status, out, _ = ctl("-i", "demo", "rebalance")
    assert status == 0
    assert out.startswith("it moves to blocks 15:30\n")
    assert out.endswith("\n  petalsctl -i demo status --watch shows the move\n")
    assert daemon.requests[-1][2] == {"to": None, "dry_run": False, "wait": False}
    why = "the weakest block would gain 2 %"
    daemon.answers["POST /v1/rebalance"] = document(
        PLAN, proposed=None, gain=None, cost=None, weakest=[], ahead=[], would_move=False, explanation=why
    )
    assert ctl("rebalance")[1] == f"it stays where it is\n  {why}\n  now  blocks 0:15\n"


def test_rebalance_waits(daemon: FakeDaemon, ctl: Ctl) -> None:
    """A line whenever something but the time changes; the end says what came of it."""
    usual = document(PROGRESS, operation="rebalance", sessions_left=0, deadline_left_s=None)
    loading = document(usual, state="loading", stage="loading", item="block 15", percent=3.2)
    daemon.answers["POST /v1/rebalance"] = lines(
        document(usual, state="rebalancing"), loading, document(loading, percent=3.4),
        document(usual, state="online", done=True, outcome="blocks 15:30 are served"),
    )  # fmt: skip
    status, out, _ = ctl("rebalance", "--wait")
    assert status == 0
    assert out == "rebalancing\nloading, loading block 15, 3 %\nonline\ndone: blocks 15:30 are served\n"


def test_drain_without_waiting(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.answers["POST /v1/drain"] = {}
    status, out, _ = ctl("drain", "--deadline", "30")
    assert status == 0
    assert out == (
        "draining: new sessions are refused from now on\n  petalsctl wait --drained waits for the last session\n"
    )
    assert daemon.requests == [("POST", "/v1/drain", {"deadline_s": 30.0, "wait": False})]


def test_a_drain_is_redrawn_on_one_line(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """Sessions left and the time to the deadline; at the end only the outcome stays."""
    daemon.answers["POST /v1/drain"] = lines(PROGRESS, document(PROGRESS, sessions_left=1), DRAINED)
    command = on_terminal(daemon, "drain", "--wait")
    assert command.finish() == 0
    assert "draining, 3 sessions left, at most 42 s" in command.raw
    assert "draining, 1 session left, at most 42 s" in command.raw
    assert command.screen.text == "drained: no sessions are left"
    assert command.screen.has_cursor


def test_interrupting_does_not_cancel_a_drain(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """Ctrl-C says so, with the commands that show it again and that call it off; nothing more is asked."""
    is_over = threading.Event()

    def endless() -> Iterator[bytes]:
        while not is_over.wait(0.05):
            yield json.dumps(PROGRESS).encode() + b"\n"

    daemon.answers["POST /v1/drain"] = lambda: (200, endless())
    try:
        command = on_terminal(daemon, "drain", "--wait")
        command.wait_for(lambda text: "3 sessions left" in text)
        command.press_ctrl_c()
        assert command.finish() == 130
        assert daemon.hung_up.wait(10)
    finally:
        is_over.set()
    text = " ".join(command.screen.text.split())
    assert "the drain goes on: 3 sessions left, at most 42 s" in text
    assert "wait --drained shows it again" in text
    assert "resume calls it off" in text
    assert "Traceback" not in text and "^C" not in text
    assert [request[1] for request in daemon.requests] == ["/v1/drain"]


def test_progress_as_json_lines(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Each document as it came, and nothing else."""
    daemon.answers["POST /v1/drain"] = lines(PROGRESS, DRAINED)
    status, out, _ = ctl("drain", "--wait", "--json")
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [PROGRESS, DRAINED]


def test_an_operation_that_fails(daemon: FakeDaemon, ctl: Ctl) -> None:
    """The last document holds the error: exit 4."""
    error = {"code": "conflict", "message": "the drain was called off", "hint": "petalsctl drain"}
    daemon.answers["POST /v1/drain"] = lines(
        PROGRESS, document(PROGRESS, state="online", done=True, error=error)
    )
    status, _, err = ctl("drain", "--wait")
    assert (status, err) == (4, "petalsctl: the drain was called off\n  petalsctl drain\n")


def test_an_operation_may_take_long_to_begin(
    daemon: FakeDaemon, ctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swarm is looked through before a move: silence counts from the first word on."""
    monkeypatch.setattr(connection, "FOLLOW_SILENCE_S", 0.3)

    def slowly(before_s: float, between_s: float) -> Callable[[], Answer]:
        def stream() -> Iterator[bytes]:
            yield json.dumps(PROGRESS).encode() + b"\n"
            time.sleep(between_s)
            yield json.dumps(DRAINED).encode() + b"\n"

        def answer() -> Answer:
            time.sleep(before_s)
            return 200, stream()

        return answer

    daemon.answers["POST /v1/drain"] = slowly(1.0, 0.0)
    assert ctl("drain", "--wait")[0] == 0
    daemon.answers["POST /v1/drain"] = slowly(0.0, 1.0)
    status, _, err = ctl("drain", "--wait")
    assert status == 2 and "does not answer in time" in err


def test_a_daemon_that_ends_during_an_operation(daemon: FakeDaemon, ctl: Ctl) -> None:
    """No last document: it is not known what came of it, exit 2."""

    def cut() -> Answer:
        return 200, [json.dumps(PROGRESS).encode() + b"\n"]

    daemon.answers["POST /v1/drain"] = cut
    (directory := daemon.path.parent / "my files").symlink_to(daemon.path.parent)
    socket = str(directory / daemon.path.name)
    status, _, err = ctl("--socket", socket, "drain", "--wait")
    assert status == 2
    assert "before the operation was done" in err
    assert err.endswith(f"  petalsctl --socket {shlex.quote(socket)} status\n")
    daemon.answers["POST /v1/drain"] = HANG_UP
    assert ctl("drain", "--wait")[0] == 2


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(409, "conflict", 4), (403, "forbidden", 4), (400, "bad_request", 4), (429, "too_many", 4),
     (500, "internal", 4), (503, "draining", 1)],
)  # fmt: skip
@pytest.mark.parametrize("words", [["drain"], ["drain", "--wait"], ["resume"], ["reload"], ["rebalance"]])
def test_refusals(
    words: list[str], status: int, code: str, expected: int, daemon: FakeDaemon, ctl: Ctl
) -> None:
    """The daemon's sentence and hint; 1 where it just does not serve now, else 4."""
    daemon.answers[f"POST /v1/{words[0]}"] = refusal(status, code, "not now", "try later")
    assert ctl(*words) == (expected, "", "petalsctl: not now\n  try later\n")
    body = {"error": {"code": code, "message": "not now", "hint": "try later"}}
    assert json.loads(ctl(*words, "--json")[1]) == body


def test_each_problem_of_a_wrong_file_has_its_line(daemon: FakeDaemon, ctl: Ctl) -> None:
    """`systemctl reload` puts them into the journal so."""
    message = "the configuration cannot be used:\n  demo.toml: unknown key a.b\n  demo.toml: unknown key c.d"
    daemon.answers["POST /v1/reload"] = refusal(422, "bad_config", message, "")
    assert ctl("reload") == (4, "", f"petalsctl: {message}\n")


def test_a_member_of_no_group_is_told_which_to_join(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Who may read but not act gets the two ways to act."""
    daemon.answers["POST /v1/drain"] = refusal(
        403, "forbidden", "only root and some others may do this", acting_group="petalsd"
    )
    status, _, err = ctl("drain")
    assert status == 4
    assert "sudo petalsctl drain; or join its group: sudo usermod -aG " in err


def test_resume(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.answers["POST /v1/resume"] = {}
    assert ctl("resume") == (0, "serving again\n", "")
    assert daemon.requests == [("POST", "/v1/resume", {})]


def test_reload(daemon: FakeDaemon, ctl: Ctl) -> None:
    """What is in force, and what waits for a restart, with its command."""
    daemon.answers["POST /v1/reload"] = {"applied": ["daemon.log_level"], "needs_restart": ["engine.threads"]}
    status, out, _ = ctl("reload")
    assert status == 0
    assert out == (
        "applied  daemon.log_level\nneeds a restart  engine.threads\n  sudo systemctl restart petalsd@demo\n"
    )
    daemon.answers["POST /v1/reload"] = {"applied": [], "needs_restart": []}
    assert ctl("reload")[1].startswith("the configuration is as it was")


def test_metrics_are_passed_through(daemon: FakeDaemon, ctl: Ctl) -> None:
    text = "# TYPE petalsd_up gauge\npetalsd_up 1\n"
    daemon.answers["GET /metrics"] = lambda: (200, text.encode())
    assert ctl("metrics") == (0, text, "")


def test_version(daemon: FakeDaemon, system: object, ctl: Ctl) -> None:
    """Ours, and the daemon's; a daemon of another version is noticed."""
    from petalsd import __version__

    daemon.answers["GET /v1/version"] = {"version": __version__}
    assert ctl("version") == (0, f"petalsctl {__version__}\npetalsd   {__version__}\n", "")
    daemon.answers["GET /v1/version"] = {"version": "0.0.1"}
    assert "restart the daemon after an upgrade" in ctl("version")[1]
    assert ctl("--version")[:2] == (0, f"petalsctl {__version__}\n")
