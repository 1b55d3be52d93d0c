"""What NVIDIA's driver says of its cards: persistence, memory, clocks, memory errors; the kernel's log of Xids."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from petalsd.cli.petalsctl.findings import Check, Finding
from petalsd.cli.petalsctl.gpu_reports import QUERY, Card, Xid, parse_cards, parse_xids
from petalsd.cli.petalsctl.units import counted, size

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# nvidia-smi loads the driver's state when no process holds it, and hangs on some broken cards.
_DEADLINE_S = 15.0
_SMI = ("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")
_KERNEL_LOG = ("journalctl", "-k", "-b", "--no-pager", "-o", "short-iso", "--grep", "NVRM: Xid", "-n", "200")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command printed, or why there is nothing: ``problem`` is empty where it ran to its end."""

    status: int
    output: str
    problem: str = ""


def gpu_checks() -> list[tuple[str, Check]]:
    """None on a machine without NVIDIA's driver: another check says so."""
    if not NVIDIA_DRIVER.exists():
        return []
    return [("GPU", check_cards), ("Xids", check_xids)]


def check_cards() -> Iterator[Finding]:
    answer = ask(_SMI)
    if answer.problem:
        fix = "install it (Debian: apt install nvidia-smi) to see persistence, clocks and memory errors"
        yield Finding("GPU", "warn", answer.problem, fix)
    elif answer.status:
        fix = "a lost GPU needs a reset (nvidia-smi --gpu-reset) or a restart of the machine"
        yield Finding("GPU", "fail", _first_line(answer.output) or f"nvidia-smi: status {answer.status}", fix)
    else:
        for card in parse_cards(answer.output):
            yield from judge_card(card)


def check_xids() -> Finding:
    answer = ask(_KERNEL_LOG)
    if answer.problem or "insufficient permissions" in answer.output:
        text = answer.problem or "the kernel's log may not be read by this user"
        return Finding("Xids", "ok", f"not looked for: {text}", "sudo petalsctl doctor, or the group adm")
    return judge_xids(list(parse_xids(answer.output.splitlines())))


def judge_card(card: Card) -> Iterator[Finding]:
    """A line about the card, and one for each thing that is wrong with it."""
    name = f"GPU {card.index}"
    yield Finding(name, "ok", _describe(card))
    if card.is_persistent is False:
        fix = "systemctl enable --now nvidia-persistenced, or nvidia-smi -pm 1"
        yield Finding(
            name, "warn", "persistence is off: each start waits for the driver to set the card up", fix
        )
    if card.slowed_by:
        fix = "look at cooling, power supply and limit: nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE"
        yield Finding(name, "warn", f"slowed down by {' and '.join(card.slowed_by)}", fix)
    if card.ecc_errors:
        fix = "a reset retires the memory: nvidia-smi --gpu-reset; if it comes again, replace the card"
        yield Finding(name, "fail", f"{counted(card.ecc_errors, 'uncorrectable memory error')}", fix)


def judge_xids(xids: Sequence[Xid]) -> Finding:
    """How often each came since the machine started, the last one first."""
    if not xids:
        return Finding("Xids", "ok", "none in the kernel's log since the machine started")
    last = xids[-1]
    counts = Counter(xid.number for xid in xids)
    others = ", ".join(f"{number} x{times}" for number, times in counts.most_common())
    text = f"{others}; the last is {last.number} ({last.meaning}) of {last.bus}"
    fix = "journalctl -k -g 'NVRM: Xid' has the lines, docs/operate.md what they mean"
    return Finding("Xids", "warn", f"{text} at {last.when}" if last.when else text, fix)


def ask(words: Sequence[str], deadline_s: float = _DEADLINE_S) -> Answer:
    """Run a command that prints something; never raises for a command that is absent or hangs."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=deadline_s, check=False
        )
    except FileNotFoundError:
        return Answer(127, "", f"{words[0]} is not installed")
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"{words[0]} did not answer within {deadline_s:g} s")
    except OSError as error:
        return Answer(126, "", f"{words[0]}: {error.strerror}")
    return Answer(done.returncode, done.stdout or done.stderr)


def _describe(card: Card) -> str:
    """As far as the driver knows it."""
    parts = [card.name, f"driver {card.driver}"]
    if card.total_bytes is not None and card.used_bytes is not None:
        parts.append(f"{size(card.used_bytes)} of {size(card.total_bytes)} used")
    if card.clock_mhz is not None and card.max_clock_mhz is not None:
        parts.append(f"{card.clock_mhz} of {card.max_clock_mhz} MHz")
    if card.temperature_c is not None:
        parts.append(f"{card.temperature_c} °C")
    return ", ".join(parts)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
