"""The summary and the pictures show what was measured, and leave out what was not."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.bandwidth import Bandwidth
from benchmarks.charts import Bar, BarPanel, Line, LinePanel, draw_panels, format_value
from benchmarks.plot import draw_all
from benchmarks.report import Row, Run, publish, read_results
from benchmarks.summary import summarize_results
from benchmarks.timing import summarize

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {
    "cpu": "a processor",
    "cores": "2",
    "torch": "2.0",
    "commit": "abc",
    "date": "2026-01-01T00:00:00Z",
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One-block steps and a decode step at two numbers of sessions, of petalsd and of those beside it."""
    run = Run(MACHINE, Bandwidth({1: 20.0}, 1 << 28))
    blocks = [
        Row(name, {"threads": 2}, "decode step of one block", "ms", summarize([milliseconds]))
        for name, milliseconds in (("echo", 0.3), ("petals-2.2", 5.0), ("petalsd", 1.0))
    ]
    steps = [
        Row(name, which, "decode step", "ms", summarize([sessions * milliseconds]), 100_000_000)
        for sessions in (1, 8)
        for name, milliseconds in (("transformers", 40.0), ("petalsd", 10.0))
        for which in [{"format": "bfloat16", "sessions": sessions, "context": 256, "threads": 1}]
    ]
    publish("step_latency", blocks, run, tmp_path)
    publish("decode_step", steps, run, tmp_path)
    return tmp_path


def test_the_summary_compares(results: Path) -> None:
    """A Markdown row for each figure that there is, with the other's, the ratio and the share of the memory."""
    text = summarize_results(read_results(results))
    block = "| one-block decode step over loopback p2p | petals-2.2 | 5.00 ms | 1.00 ms | 5.00 x |"
    assert f"{block} a bare echo takes 0.30 ms |" in text
    line = next(line for line in text.splitlines() if "bfloat16, 1 session(s)" in line)
    assert line.endswith("| transformers | 40.0 ms | 10.0 ms | 4.00 x | 10.0 GB/s, 50 % of the memory |")
    assert "admitted" not in text


def test_growth_is_held_against_the_speed_of_the_weights(tmp_path: Path) -> None:
    """200 MB in 10 ms make 5 ms of the 100 MB more; what the memory could give does not count."""
    steps = [
        Row("petalsd", which, "decode step", "ms", summarize([milliseconds]), nbytes)
        for context, milliseconds, nbytes in ((16, 10.0, 200_000_000), (8192, 20.0, 300_000_000))
        for which in [{"format": "bfloat16", "sessions": 1, "context": context, "threads": 1}]
    ]
    publish("decode_step", steps, Run(MACHINE, Bandwidth({1: 40.0}, 1 << 28)), tmp_path)
    text = summarize_results(read_results(tmp_path))
    assert "| context 16 | 10.0 ms | 20.0 ms |  | growth 2.00 x the floor" in text
    assert "(5.00 ms)" in text


def test_no_results_make_no_rows_and_no_pictures(tmp_path: Path) -> None:
    assert len(summarize_results({}).splitlines()) == 2
    assert draw_all({}, tmp_path / "pictures") == []


def test_pictures_are_svg_that_names_what_it_shows(results: Path, tmp_path: Path) -> None:
    """The overview is well-formed, and its texts are the providers and the measured values."""
    written = draw_all(read_results(results), tmp_path / "pictures")
    overview = next(path for path in written if path.name == "overview.svg")
    root = ET.parse(overview).getroot()
    texts = {element.text for element in root.iter(f"{SVG}text")}
    assert {"bare echo", "Petals 2.2", "petalsd", "0.30", "5.00", "transformers", "memory's floor"} <= texts
    assert "prefers-color-scheme: dark" in overview.read_text()
    assert root.get("role") == "img" and root.get("aria-label")


def test_figures_of_several_runs_are_not_said_to_be_of_one(results: Path, tmp_path: Path) -> None:
    """A benchmark ran later and elsewhere: the picture and the summary name both runs."""
    (overview,) = draw_all(read_results(results), tmp_path / "pictures")
    assert "Medians of one run on a processor, 2 cores, torch 2.0, 2026-01-01." in overview.read_text()
    later = {**MACHINE, "cpu": "another one", "commit": "def", "date": "2026-02-02T00:00:00Z"}
    steps = [Row("petalsd", {}, "sessions admitted", "sessions", summarize([96.0]))]
    publish("admission", steps, Run(later, Bandwidth({1: 10.0}, 1 << 28)), results)
    documents = read_results(results)
    draw_all(documents, tmp_path / "pictures")
    both = "another one, 2 cores, torch 2.0, 2026-02-02; a processor, 2 cores, torch 2.0, 2026-01-01"
    assert f"Medians of 2 runs on {both}." in overview.read_text()
    text = summarize_results(documents)
    assert "another one, 2 cores, memory 10.0 GB/s by one thread, torch 2.0, commit def" in text
    assert "a processor, 2 cores, memory 20.0 GB/s by one thread, torch 2.0, commit abc" in text


def test_everything_lies_inside_the_picture() -> None:
    """Bars, points and labels, also where values differ by orders of magnitude."""
    lines = [Line("c", [(1, 0.01), (32, 900.0)], "ours"), Line("d", [(1, 1), (32, 900)], "floor")]
    panels = [
        BarPanel("bars", "ms", [Bar("a", 0.001, "other"), Bar("b", 5000.0, "ours", "9 x")]),
        LinePanel("lines", "ms", lines),
    ]
    root = ET.fromstring(draw_panels("head", "note", panels, 2))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for element in root.iter():
        for name, limit in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height)):
            assert 0 <= float(element.get(name, 0)) <= limit
    heights = [
        float(element.get("y", 0)) for element in root.iter(f"{SVG}text") if element.text in ("c", "d")
    ]
    assert abs(heights[0] - heights[1]) >= 12, "the labels cover each other"


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "0.12"), (14.84, "14.8"), (9.996, "10.0"), (4713.2, "4,713")]
)
def test_values_have_three_digits(value: float, text: str) -> None:
    assert format_value(value) == text
