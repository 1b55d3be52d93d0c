"""What checks and moves leave behind."""

from __future__ import annotations

import structlog

from petalsd.daemon.placement_record import PlacementRecord
from petalsd.metrics import Metrics
from petalsd.swarm.placement.decision import Verdict
from tests.daemon.measured import read
from tests.daemon.placement_checks import MOVE, NEW, OLD, staying


def record() -> tuple[PlacementRecord, Metrics]:
    metrics = Metrics()
    made = PlacementRecord(metrics)
    metrics.read_from(made.read)
    return made, metrics


def gains(metrics: Metrics) -> dict[str, float]:
    name = "petalsd_move_gain_tokens_per_second"
    return {dict(labels)["kind"]: value for (found, labels), value in read(metrics).items() if found == name}


def test_a_move_is_judged_by_the_first_check_that_sees_it_done() -> None:
    """Once, and not while the swarm still sees blocks being loaded."""
    placement, metrics = record()
    with structlog.testing.capture_logs() as logs:
        placement.checked(MOVE)
        assert gains(metrics) == {}
        placement.checked(staying(NEW, 99.0, Verdict.LOADING))
        placement.checked(staying(NEW, 13.0))
        placement.checked(staying(NEW, 50.0))
    assert gains(metrics) == {"predicted": 4.0, "realised": 3.0}
    (judged,) = [line for line in logs if line["event"] == "move_judged"]
    assert (judged["span"], judged["predicted_gain"], judged["realised_gain"]) == ("2:6", 4.0, 3.0)


def test_a_move_that_failed_is_not_judged() -> None:
    placement, metrics = record()
    placement.checked(MOVE)
    placement.checked(staying(OLD, 12.0))
    placement.checked(staying(NEW, 13.0))
    assert gains(metrics) == {}


def test_every_check_is_counted() -> None:
    """Each verdict has its series from the start; where it moves is louder than where it stays."""
    placement, metrics = record()
    with structlog.testing.capture_logs() as logs:
        placement.checked(MOVE)
        placement.checked(staying(OLD, 12.0))
        placement.checked(staying(OLD, 12.0))
    counts = {
        dict(labels)["verdict"]: value
        for (name, labels), value in read(metrics).items()
        if name == "petalsd_placement_checks_total"
    }
    assert counts == {**{verdict.value: 0.0 for verdict in Verdict}, "move": 1.0, "fits": 2.0}
    assert [line["log_level"] for line in logs] == ["info", "debug", "debug"]
