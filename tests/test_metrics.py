"""The catalogue, the registry behind it, and the page that describes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from petalsd.metrics import CATALOGUE, CONTENT_TYPE, FAMILIES, PREFIX, Family, Metrics, Reading
from petalsd.metrics_reference import MARKER, main, metric_tables

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) to value, as a scraper reads them."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_text_declares_every_family_with_its_type_and_meaning() -> None:
    """Those that have no value yet too, so that a reader of the text knows all there is."""
    text = Metrics().exposition().decode()
    for family in FAMILIES.values():
        assert f"# HELP {PREFIX}{family.name} {family.help}\n" in text
        assert f"# TYPE {PREFIX}{family.name} {family.kind}\n" in text
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_counters_and_histograms_count() -> None:
    """A series starts at 0 when its labels are named; a histogram counts into the bucket of its value."""
    metrics = Metrics()
    metrics.counter("pushes_total").labels("failed")
    metrics.counter("pushes_total").labels("delivered").inc(2)
    metrics.histogram("batch_rows").observe(3)
    values = samples(metrics)
    assert values["petalsd_pushes_total", (("outcome", "failed"),)] == 0
    assert values["petalsd_pushes_total", (("outcome", "delivered"),)] == 2
    assert values["petalsd_batch_rows_bucket", (("le", "2.0"),)] == 0
    assert values["petalsd_batch_rows_bucket", (("le", "4.0"),)] == 1
    assert values["petalsd_batch_rows_sum", ()] == 3


def test_gauges_are_read_at_every_scrape_from_all_sources() -> None:
    """Nothing is remembered: a source that says nothing leaves no value behind."""
    metrics, sessions = Metrics(), [Reading("sessions", 3)]
    metrics.read_from(lambda: sessions)
    metrics.read_from(lambda: iter([Reading("state", True, ("online",))]))
    values = samples(metrics)
    assert values["petalsd_sessions", ()] == 3
    assert values["petalsd_state", (("state", "online"),)] == 1
    sessions.clear()
    assert ("petalsd_sessions", ()) not in samples(metrics)


@pytest.mark.parametrize(
    ("reading", "error"),
    [(Reading("no_such_gauge", 1), KeyError), (Reading("steps_total", 1, ("decode",)), KeyError),
     (Reading("state", 1), ValueError), (Reading("sessions", 1, ("x",)), ValueError)],
)  # fmt: skip
def test_a_reading_that_is_not_declared_is_a_bug_that_shows(reading: Reading, error: type[Exception]) -> None:
    metrics = Metrics()
    metrics.read_from(lambda: [reading])
    with pytest.raises(error):
        metrics.exposition()


def test_instruments_have_the_names_of_the_catalogue_only() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.counter("batch_rows")
    with pytest.raises(KeyError):
        metrics.histogram("steps_total")


def test_nothing_is_global() -> None:
    """Two daemons in one process share nothing, and the library's own registry knows nothing of us."""
    first, second = Metrics(), Metrics()
    first.counter("moves_total").inc()
    assert samples(first)["petalsd_moves_total", ()] == 1
    assert samples(second)["petalsd_moves_total", ()] == 0
    assert not [metric.name for metric in REGISTRY.collect() if metric.name.startswith(PREFIX)]


def test_the_process_itself_is_there_and_birthdays_are_not() -> None:
    names = {name for name, _ in samples(Metrics())}
    assert {
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
        "process_start_time_seconds",
        "python_info",
        "python_gc_collections_total",
    } <= names
    assert not [name for name in names if name.endswith("_created")]


ALL = [family for families in CATALOGUE.values() for family in families]


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_a_family_keeps_the_rules_of_naming(family: Family) -> None:
    """Snake case; `_total` for counters alone; buckets that grow, for histograms alone; no peer in a label."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
    assert family.name.endswith("_total") == (family.kind == "counter")
    assert bool(family.buckets) == (family.kind == "histogram")
    assert list(family.buckets) == sorted(set(family.buckets))
    assert not any(re.search("peer|session|client|maddr|address", label) for label in family.labels)
    assert family.help[0].isupper() or family.help[0].isdigit()
    assert "|" not in family.help


def test_no_name_is_given_twice() -> None:
    assert len(ALL) == len(FAMILIES)


def test_the_page_has_the_tables_of_the_catalogue() -> None:
    """`make docs` writes them."""
    _, _, tables = PAGE.read_text().partition(MARKER)
    assert tables.strip() == metric_tables().strip()


def test_the_page_speaks_of_metrics_that_exist() -> None:
    """What the text above the tables names is in them."""
    text, _, _ = PAGE.read_text().partition(MARKER)
    named = set(re.findall(r"`petalsd_([a-z_]*[a-z])", text))
    assert len(named) > 4
    assert named <= set(FAMILIES)


def test_the_tables_are_written_below_the_marker(tmp_path: Path) -> None:
    page = tmp_path / "metrics.md"
    page.write_text(f"# Mine\n\n{MARKER}\nold\n")
    main(page)
    assert page.read_text() == f"# Mine\n\n{MARKER}\n\n{metric_tables()}"
