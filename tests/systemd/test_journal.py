"""What journald itself makes of our messages, and that `journalctl` finds them as the pages say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from petalsd.journal import MESSAGE_IDS
from tests.systemd.installation import binds, install, wrapper
from tests.systemd.journal import Entry, parse_entries
from tests.systemd.lab import Lab

pytestmark = [pytest.mark.systemd, pytest.mark.slow]

UNIT = "petalsd@talker.service"
ITEMS = ["x" * 8000] * 60
PROGRAM = """
import structlog
from petalsd.log import configure_logging

configure_logging("auto", "info")
log = structlog.get_logger("petalsd.x")
log.warning("warning_raised", code="disk_full", detail="two\\nlines")
log.info("large", items=["x" * 8000] * 60)
try:
    raise OSError("no luck")
except OSError:
    log.exception("unexpected")
"""


@pytest.fixture(scope="module")
def lab(able: None) -> Iterator[Lab]:
    """A unit in it has logged each kind of message."""
    with Lab(binds()) as lab:
        install(lab)
        lab.write("/run/talker.py", PROGRAM)
        lab.write("/usr/bin/talker", wrapper("/run/talker.py"), mode=0o755)
        lab.write(f"/run/systemd/system/{UNIT}", "[Service]\nType=oneshot\nExecStart=/usr/bin/talker\n")
        lab.systemctl("daemon-reload")
        lab.systemctl("start", UNIT)
        lab.run(["journalctl", "--sync"])
        yield lab


def entries(lab: Lab, *matches: str) -> list[Entry]:
    return parse_entries(lab.run(["journalctl", "--output=json", "--all", *matches]).stdout)


def test_an_event_is_found_by_its_id_and_its_fields(lab: Lab) -> None:
    """`auto` was the journal; the unit, the priority and the text of several lines are as they were sent."""
    (entry,) = entries(lab, f"MESSAGE_ID={MESSAGE_IDS['warning_raised']}", "PETALSD_CODE=disk_full")
    assert (entry.unit, entry.event, entry["detail"]) == (UNIT, "warning_raised", "two\nlines")
    assert entry.message == r'warning_raised code=disk_full detail="two\nlines"'
    assert entry.fields["_TRANSPORT"] == "journal"
    found = entries(lab, "-t", "petalsd", "-p", "warning", "-u", UNIT)
    assert [one.event for one in found] == ["warning_raised", "unexpected"]


def test_a_message_too_large_for_a_datagram_arrives_whole(lab: Lab) -> None:
    """As a sealed file."""
    (entry,) = entries(lab, "PETALSD_EVENT=large")
    assert json.loads(entry["items"]) == ITEMS


def test_a_traceback_is_a_field(lab: Lab) -> None:
    """What `journalctl` shows is one line; all of it is one option away."""
    (entry,) = entries(lab, "PETALSD_EVENT=unexpected")
    assert (entry.message, entry["error"]) == ('unexpected error="OSError: no luck"', "OSError: no luck")
    assert "talker.py" in entry["exception"]
    shown = lab.run(["journalctl", "-u", UNIT, "-o", "cat", "PETALSD_EVENT=unexpected"]).stdout
    assert shown == 'unexpected error="OSError: no luck"\n'
