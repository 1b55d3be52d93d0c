"""What is read out of NVIDIA's tools: recorded outputs, absent tools, tools that hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalsd.cli.petalsctl import gpu_checks
from petalsd.cli.petalsctl.gpu_checks import ask, check_cards, check_xids, judge_card, judge_xids
from petalsd.cli.petalsctl.gpu_reports import parse_cards, parse_xids

IDLE_3090 = (
    "0, NVIDIA GeForce RTX 3090, 535.183.01, Disabled, 24576, 312, 210, 2100, 0x0000000000000001, 34, [N/A]\n"
)
BUSY_A100 = (
    "0, NVIDIA A100-SXM4-80GB, 550.90.07, Enabled, 81920, 70125, 1275, 1410, 0x0000000000000024, 84, 2\n"
    "1, NVIDIA A100-SXM4-80GB, 550.90.07, Enabled, 81920, 3, 210, 1410, 0x0000000000000001, 30, 0\n"
)
BROKEN = "Unable to determine the device handle for GPU0000:01:00.0: Unknown Error\n"
KERNEL_LOG = """\
2026-11-24T21:10:13+0000 host kernel: NVRM: GPU at PCI:0000:01:00: GPU-2f1c9a0e-77aa-4a1c-8f53-61aa3d9b2c10
2026-11-24T21:10:13+0000 host kernel: NVRM: Xid (PCI:0000:01:00): 31, pid=4711, name=petalsd, Ch 00000010, intr 00000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_0 faulted @ 0x7f3a_12000000
2026-11-25T03:44:01+0000 host kernel: NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
"""  # noqa: E501
DMESG = "[ 8812.401233] NVRM: Xid (PCI:0000:41:00): 48, pid=1203, name=python, DBE (double bit error)"


def test_an_idle_card() -> None:
    """Idle clocks are no slow-down; what the card does not have is not invented."""
    (card,) = parse_cards(IDLE_3090)
    assert (card.name, card.driver, card.ecc_errors, card.slowed_by) == (
        "NVIDIA GeForce RTX 3090", "535.183.01", None, (),
    )  # fmt: skip
    described, persistence = judge_card(card)
    assert described.text == (
        "NVIDIA GeForce RTX 3090, driver 535.183.01, 312.0 MiB of 24.0 GiB used, 210 of 2100 MHz, 34 °C"
    )
    assert persistence.level == "warn"
    assert "persistence is off" in persistence.text


def test_a_hot_card_with_errors() -> None:
    """What slows it is named; an uncorrectable error would keep it from serving rightly."""
    hot, cool = parse_cards(BUSY_A100)
    found = {finding.level: finding.text for finding in judge_card(hot)}
    assert found["warn"] == "slowed down by its power limit and the driver, for heat"
    assert found["fail"] == "2 uncorrectable memory errors"
    assert [finding.level for finding in judge_card(cool)] == ["ok"]


def test_an_output_of_another_form() -> None:
    """A driver that prints other columns must not be read wrongly."""
    with pytest.raises(ValueError, match="3 columns"):
        parse_cards("0, NVIDIA A100, 550.90.07\n")


def test_xids_of_both_logs() -> None:
    """Number, card and time; lines of the driver that are none are passed over."""
    mmu, bus = parse_xids(KERNEL_LOG.splitlines())
    assert (mmu.number, bus.number, bus.bus) == (31, 79, "0000:01:00")
    assert bus.when == "2026-11-25T03:44:01+0000"
    (memory,) = parse_xids([DMESG])
    assert (memory.number, memory.bus, memory.when) == (48, "0000:41:00", "8812.401233")
    finding = judge_xids([mmu, mmu, bus])
    assert finding.text == (
        "31 x2, 79 x1; the last is 79 (the card fell off its bus) of 0000:01:00 at 2026-11-25T03:44:01+0000"
    )
    assert judge_xids([]).level == "ok"


def a_tool(directory: Path, name: str, script: str) -> None:
    file = directory / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_absent_and_broken_tools(tools: Path) -> None:
    """It is said plainly that a tool is missing; a card that the driver cannot reach is a failure."""
    (finding,) = check_cards()
    assert (finding.level, finding.text) == ("warn", "nvidia-smi is not installed")
    assert "not looked for: journalctl is not installed" in check_xids().text
    a_tool(tools, "nvidia-smi", f"echo '{BROKEN.strip()}'; exit 15")
    a_tool(
        tools,
        "journalctl",
        "echo 'No journal files were opened due to insufficient permissions.' >&2; exit 1",
    )
    (finding,) = check_cards()
    assert (finding.level, finding.text) == ("fail", BROKEN.strip())
    assert "may not be read by this user" in check_xids().text


def test_a_tool_that_hangs(tools: Path) -> None:
    """Broken cards make nvidia-smi hang: it is given up."""
    a_tool(tools, "nvidia-smi", "exec /bin/sleep 60")
    assert ask(["nvidia-smi"], deadline_s=0.2).problem == "nvidia-smi did not answer within 0.2 s"


def test_a_machine_with_a_card(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the driver there both checks run, in the order of doctor's list; without it none does."""
    monkeypatch.setattr(gpu_checks, "NVIDIA_DRIVER", tools / "absent")
    assert gpu_checks.gpu_checks() == []
    monkeypatch.setattr(gpu_checks, "NVIDIA_DRIVER", tools)
    a_tool(tools, "nvidia-smi", f"echo '{IDLE_3090.strip()}'")
    a_tool(tools, "journalctl", f'echo "{DMESG}"')
    found = [finding for _, check in gpu_checks.gpu_checks() for finding in _listed(check())]
    assert [finding.name for finding in found] == ["GPU 0", "GPU 0", "Xids"]


def _listed(found: object) -> list[gpu_checks.Finding]:
    return [found] if isinstance(found, gpu_checks.Finding) else list(found)  # type: ignore[call-overload]
