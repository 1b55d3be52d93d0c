"""The journal's native protocol, over a real datagram socket."""

from __future__ import annotations

import inspect
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from petalsd import journal
from petalsd.journal import MESSAGE_IDS, JournalHandler, fields_of, is_journal, write_at_once
from petalsd.log import configure_logging
from tests.journald import Receiver, parse
from tests.log_calls import log_calls

DOCS = Path(__file__).resolve().parents[1] / "docs" / "operate.md"


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """All logging goes to a journal of the test's own."""
    receiver = Receiver(tmp_path / "socket")
    receiver.start()
    monkeypatch.setattr(journal, "SOCKET", tmp_path / "socket")
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    configure_logging("journal", "info")
    yield receiver
    root.handlers[0].close()
    root.handlers = handlers
    root.setLevel(level)
    receiver.stop()


@pytest.fixture
def log(journald: Receiver) -> Any:
    return structlog.get_logger("petalsd.x")


def test_an_event_has_its_fields_and_a_line_to_read(journald: Receiver, log: Any) -> None:
    """Fields to select by, texts as they are and the rest as JSON; where it was logged; the id of its kind."""
    log.info("online", span="0:4", maddrs=["/ip4/1.2.3.4/tcp/1"], reason="as asked", first=True)
    fields = journald.receive()
    line = inspect.currentframe().f_lineno - 2  # type: ignore[union-attr]
    assert fields == {
        "MESSAGE": 'online span=0:4 maddrs="[\\"/ip4/1.2.3.4/tcp/1\\"]" reason="as asked" first=true',
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "petalsd",
        "LOGGER": "petalsd.x",
        "MESSAGE_ID": MESSAGE_IDS["online"],
        "CODE_FILE": __file__,
        "CODE_LINE": str(line),
        "CODE_FUNC": "test_an_event_has_its_fields_and_a_line_to_read",
        "THREAD_NAME": threading.current_thread().name,
        "PETALSD_EVENT": "online",
        "PETALSD_SPAN": "0:4",
        "PETALSD_MADDRS": '["/ip4/1.2.3.4/tcp/1"]',
        "PETALSD_REASON": "as asked",
        "PETALSD_FIRST": "true",
    }


@pytest.mark.parametrize(
    ("level", "priority"), [("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")]
)
def test_levels_are_priorities(journald: Receiver, log: Any, level: str, priority: str) -> None:
    """As syslog counts them, so that `journalctl -p err` finds what is an error."""
    getattr(log, level)("something")
    fields = journald.receive()
    assert fields["PRIORITY"] == priority
    assert "MESSAGE_ID" not in fields


def test_lines_of_libraries_are_not_our_events(journald: Receiver) -> None:
    """They come with their logger and the place, and with none of our ids whatever they say."""
    logging.getLogger("some_library.part").warning("%s", "failed")
    fields = journald.receive()
    assert (fields["MESSAGE"], fields["LOGGER"], fields["PRIORITY"]) == ("failed", "some_library.part", "4")
    assert fields["CODE_FUNC"] == "test_lines_of_libraries_are_not_our_events"
    assert not {"MESSAGE_ID", "PETALSD_EVENT"} & set(fields)


def test_any_text_and_any_name_can_be_sent(journald: Receiver, log: Any) -> None:
    """Several lines travel with their length, names are made valid, half characters do not stop a line."""
    log.info("a\x1b[31mb", text="two\nlines=", **{"späti.kein-Name": 1, "x" * 100: 2}, half="\ud800")
    fields = journald.receive()
    assert fields["PETALSD_TEXT"] == "two\nlines="
    assert fields["PETALSD_SP_TI_KEIN_NAME"] == "1"
    assert fields["PETALSD_" + "X" * 56] == "2"
    assert fields["PETALSD_HALF"] == "\\ud800"
    assert fields["MESSAGE"].startswith('a [31mb text="two\\nlines="')
    assert "\n" not in fields["MESSAGE"]


def test_an_exception_is_a_field_and_a_word_in_the_line(journald: Receiver, log: Any) -> None:
    """The line says type and first line; the field has the frames and what it came from."""
    try:
        try:
            raise OSError("no disk")
        except OSError as error:
            raise ValueError("broken\nmore of it") from error
    except ValueError:
        log.exception("unexpected", peer="p")
    fields = journald.receive()
    assert fields["MESSAGE"] == 'unexpected peer=p error="ValueError: broken"'
    text = fields["PETALSD_EXCEPTION"]
    assert text.startswith("Traceback (most recent call last):\n")
    assert (
        text.index("OSError: no disk") < text.index("which caused:") < text.index("ValueError: broken\nmore")
    )
    assert "test_an_exception_is_a_field" in text


def test_what_is_too_large_for_a_datagram_comes_as_a_sealed_file(journald: Receiver, log: Any) -> None:
    """The kernel bounds a datagram; a message may be longer."""
    items = ["x" * 8000] * 60
    log.info("large", items=items)
    assert json.loads(journald.receive()["PETALSD_ITEMS"]) == items
    assert journald.num_files == 1
    log.info("small")
    assert journald.receive()["MESSAGE"] == "small"
    assert journald.num_files == 1


def make_record(text: str) -> logging.LogRecord:
    return logging.LogRecord("petalsd.x", logging.INFO, __file__, 1, text, (), None)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Standard error of the handler under test: (read end, write end)."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def make_handler(path: Path, fallback_fd: int) -> JournalHandler:
    handler = JournalHandler(path, fallback_fd)
    handler.setFormatter(logging.Formatter('{"event": "%(message)s", "logger": "%(name)s"}'))
    return handler


def test_without_a_journal_lines_go_to_standard_error(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """And to the journal again as soon as there is one: nothing has to be restarted with it."""
    handler = make_handler(tmp_path / "socket", pipe[1])
    handler.handle(make_record("alone"))
    assert json.loads(os.read(pipe[0], 4096)) == {"event": "alone", "logger": "petalsd.x"}
    for round_ in ("first", "second"):
        receiver = Receiver(tmp_path / "socket")
        receiver.start()
        handler.handle(make_record(round_))
        assert receiver.receive()["MESSAGE"] == round_
        receiver.stop()
    handler.close()


def test_a_journal_that_does_not_keep_up_never_makes_us_wait(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """Queue full: standard error. That full too: lines are dropped, counted, and told of when somebody listens."""
    receiver = Receiver(tmp_path / "socket")
    receiver.start()
    handler = make_handler(tmp_path / "socket", pipe[1])
    line = len('{"event": "1000", "logger": "petalsd.x"}\n')
    for number in range(1000, 9000):  # far more than the queue and the pipe hold
        handler.handle(make_record(str(number)))
    queued = receiver.drain()
    in_pipe = os.read(pipe[0], 1 << 20).decode().splitlines()
    assert [fields["MESSAGE"] for fields in queued] == [str(1000 + n) for n in range(len(queued))]
    assert json.loads(in_pipe[0])["event"] == str(1000 + len(queued))
    assert len(in_pipe) * line > 1000
    handler.handle(make_record("later"))
    told, later = receiver.receive(), receiver.receive()
    lost = 8000 - len(queued) - len(in_pipe)
    assert lost > 0
    assert told["MESSAGE"] == f"log_lines_lost lost={lost}"
    assert (told["PETALSD_LOST"], told["PRIORITY"]) == (str(lost), "4")
    assert later["MESSAGE"] == "later"
    handler.close()
    receiver.stop()


def test_a_loss_is_told_of_at_the_end_too(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """The last chance is when the process ends."""
    while write_at_once(pipe[1], b"x" * 4096):
        pass
    handler = make_handler(tmp_path / "socket", pipe[1])
    handler.handle(make_record("lost"))
    receiver = Receiver(tmp_path / "socket")
    receiver.start()
    handler.close()
    assert receiver.receive()["PETALSD_LOST"] == "1"
    receiver.stop()


def test_standard_error_may_be_closed() -> None:
    """A descriptor that is gone, or whose reader is, takes nothing and raises nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    assert write_at_once(writer, b"x") is False
    os.close(writer)
    assert write_at_once(writer, b"x") is False
    assert is_journal(writer, {"JOURNAL_STREAM": "1:2"}) is False


def test_a_record_that_cannot_be_shown_is_named(
    journald: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logging itself would print the record with all its arguments; here only where it came from is said."""
    record = logging.LogRecord("some.library", logging.WARNING, __file__, 1, "%d secrets", ("text",), None)
    logging.getLogger().handlers[0].handle(record)  # alone: pytest's own handler would fail the test
    fields = journald.receive()
    assert (fields["MESSAGE"].split()[0], fields["LOGGER"]) == ("log_line_unwritable", "some.library")
    assert fields["PETALSD_ERROR"] == "TypeError"
    assert "secrets" not in str(fields)
    assert capsys.readouterr().err == ""


def test_auto_is_the_journal_where_standard_error_leads_there(
    journald: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd says by device and inode which stream is the journal's; any other one gets JSON."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("w") as stream, (tmp_path / "file").open("w+") as other:
        status = os.fstat(ours.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        configure_logging("auto", "info", stream)
        structlog.get_logger("petalsd.x").info("here")
        assert journald.receive()["MESSAGE"] == "here"
        configure_logging("auto", "info", other)
        structlog.get_logger("petalsd.x").info("there")
        other.seek(0)
        assert json.loads(other.read())["event"] == "there"
        configure_logging("journal", "info")


def test_the_ids_are_those_of_events_that_are_logged() -> None:
    """Eleven ids, each a random one of its own, for events whose names stand in the source and in the pages."""
    logged = {call.event for call in log_calls()}
    assert set(MESSAGE_IDS) <= logged
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS) == 11
    page = DOCS.read_text()
    for event, message_id in MESSAGE_IDS.items():
        assert len(message_id) == 32 and int(message_id, 16)
        assert f"| `{event}` | `{message_id}` |" in page


def test_fields_can_be_parsed_back() -> None:
    """What is encoded is what was meant, also where a value looks like a field."""
    fields = fields_of({"event": "x", "logger": "petalsd.y", "a": "1\nPRIORITY=0\n", "b": "=", "c": None})
    assert parse(journal.encode(fields)) == fields


def test_importing_the_journal_opens_nothing() -> None:
    """A handler that was never used has no socket."""
    before = len(os.listdir("/proc/self/fd"))
    JournalHandler().close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "systemd" not in sys.modules
