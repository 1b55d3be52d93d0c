"""One line per event, ours and the libraries', in the form asked for."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from petalsd.errors import OutOfPages
from petalsd.log import adopt_loggers, configure_logging, error_fields, set_level


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines_carry_the_fields() -> None:
    """Each line is one JSON object with event, level, time, logger and the given fields."""
    out = io.StringIO()
    configure_logging("json", "info", out)
    structlog.get_logger("petalsd.x").info("online", span="0:4", maddrs=["/ip4/1.2.3.4/tcp/1"])
    line = json.loads(out.getvalue())
    assert (line["event"], line["level"], line["logger"]) == ("online", "info", "petalsd.x")
    assert (line["span"], line["maddrs"]) == ("0:4", ["/ip4/1.2.3.4/tcp/1"])
    assert line["time"].endswith("Z")


def test_auto_is_json_when_nobody_reads_along() -> None:
    """A stream that is no terminal gets JSON; console asks for text."""
    out = io.StringIO()
    configure_logging("auto", "info", out)
    structlog.get_logger("x").info("here")
    assert json.loads(out.getvalue())["event"] == "here"
    configure_logging("console", "info", out)
    structlog.get_logger("x").info("there", field=1)
    assert "there" in out.getvalue().splitlines()[-1]
    assert "field=1" in out.getvalue().splitlines()[-1]


def test_library_lines_take_the_same_form() -> None:
    """An adopted library logs through our handler, not through its own."""
    out, own = io.StringIO(), io.StringIO()
    library = logging.getLogger("some_library")
    library.addHandler(logging.StreamHandler(own))
    library.propagate = False
    configure_logging("json", "info", out)
    adopt_loggers(["some_library"])
    library.getChild("part").warning("%d peers", 3)
    assert json.loads(out.getvalue())["event"] == "3 peers"
    assert own.getvalue() == ""


def test_the_level_can_be_changed_while_running() -> None:
    """Lines below the level are not written; a changed level takes effect at once."""
    out = io.StringIO()
    configure_logging("json", "warning", out)
    log = structlog.get_logger("x")
    log.info("quiet")
    set_level("info")
    log.info("loud")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["loud"]


def test_expected_errors_become_fields() -> None:
    """An error of ours gives message, code and hint; another one its text and type."""
    assert error_fields(OutOfPages("full", hint="wait")) == {
        "error": "full", "code": "out_of_pages", "hint": "wait"
    }  # fmt: skip
    assert error_fields(TimeoutError()) == {"error": "TimeoutError", "code": "TimeoutError"}


def test_a_traceback_is_part_of_the_json_line() -> None:
    """log.exception keeps one line per event."""
    out = io.StringIO()
    configure_logging("json", "info", out)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("x").exception("unexpected")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["exception"][0]["exc_value"] == "broken"


def test_as_a_library_events_go_to_standard_logging() -> None:
    """A program that configured nothing hears warnings of the library on standard error, and nothing on output."""
    code = (
        "import structlog; from petalsd.log import use_standard_logging; use_standard_logging(); "
        "log = structlog.get_logger('petalsd.x'); log.info('quiet'); log.warning('loud', peer='p')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("", "event='loud' peer='p'\n")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_locals(log_format: str) -> None:
    """An unexpected error is logged with its frames, but not with what was in them: activations among it."""
    out = io.StringIO()
    configure_logging(log_format, "info", out)
    hidden = "a secret activation"
    try:
        _fail(hidden)
    except RuntimeError:
        structlog.get_logger("petalsd.x").exception("broken")
    assert "_fail" in out.getvalue()
    assert hidden not in out.getvalue()


def _fail(activation: str) -> None:
    raise RuntimeError("no luck")
