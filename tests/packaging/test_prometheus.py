"""Rules, dashboard and metrics, as Prometheus' own tool sees them, and against each other."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from petalsd.daemon.warnings import KINDS
from petalsd.metrics import FAMILIES, PREFIX
from petalsd.types import DaemonState
from tests.daemon.measured import MeasuredStage
from tests.daemon.test_daemon import stopped, until_online
from tests.tiny_models import make_tiny

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "packaging" / "prometheus"
RULES = PROMETHEUS / "petalsd.rules.yml"
DASHBOARD = ROOT / "packaging" / "grafana" / "petalsd.json"
FETCHED = ROOT / ".cache" / "promtool" / "promtool"

# What Prometheus itself adds to what it scrapes.
SYNTHETIC = {"up"}
NAME = re.compile(r"\b(?:petalsd|process|python)_[a-z0-9_]+|\bup\b")


@pytest.fixture(scope="module")
def promtool() -> Path:
    """Named by PROMTOOL, in the PATH, or fetched by `make promtool`."""
    named = os.environ.get("PROMTOOL") or shutil.which("promtool")
    found = Path(named) if named else FETCHED
    if not found.exists():
        pytest.skip(f"no promtool: neither in the PATH nor at {FETCHED.relative_to(ROOT)} (make promtool)")
    return found


def check(promtool: Path, *words: str, cwd: Path = PROMETHEUS, stdin: str = "") -> tuple[int, str]:
    """Exit status and everything it said."""
    result = subprocess.run(
        [promtool, *words], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stdout + result.stderr


@pytest.fixture(scope="module")
def exposition(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a daemon that serves, with a series of every family in it."""
    home = tmp_path_factory.mktemp("exposition")
    make_tiny("llama", home / "model")
    (home / "cache").mkdir()

    async def scrape() -> str:
        stage = MeasuredStage(home / "model", home)
        running = await until_online(stage)
        await stage.let_all_happen()
        text = stage.metrics.exposition().decode()
        await stopped(stage, running)
        return text

    return asyncio.run(scrape())


@pytest.fixture(scope="module")
def exposed(exposition: str) -> set[str]:
    """The names of all samples."""
    return {re.split(r"[{ ]", line)[0] for line in exposition.splitlines() if not line.startswith("#")}


def rules(kind: str) -> Iterator[dict[str, Any]]:
    """All "alert" or "record" rules."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from (rule for rule in group["rules"] if kind in rule)


def dashboard_queries() -> list[tuple[str, str]]:
    """(panel, expression) of the dashboard, the annotations and the variables included."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    queries += [(one["name"], one["expr"]) for one in dashboard["annotations"]["list"] if "expr" in one]
    return queries


def as_promql(expression: str) -> str:
    """What Grafana would send with everything chosen."""
    for variable, text in (
        ("$__rate_interval", "1m"),
        ("$__interval", "1m"),
        ("$job", ".+"),
        ("$instance", ".+"),
    ):
        expression = expression.replace(variable, text)
    assert "$" not in expression, expression
    return expression


def metrics_of(expression: str) -> set[str]:
    """The names of metrics, without those of recording rules, labels and values."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(?:by|without|on|ignoring) *\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    return set(NAME.findall(re.sub(r"\binstance:[a-z0-9_:]+", "", bare)))


def test_promtool_finds_nothing_to_improve_in_the_metrics(promtool: Path, exposition: str) -> None:
    """Its linter knows the conventions of names, units and types."""
    assert check(promtool, "check", "metrics", stdin=exposition) == (0, "")


def test_promtool_would_find_something(promtool: Path) -> None:
    """A counter without _total, and no help: the check above can fail."""
    status, text = check(
        promtool, "check", "metrics", stdin="# TYPE petalsd_steps counter\npetalsd_steps 1\n"
    )
    assert status != 0
    assert "petalsd_steps" in text


@pytest.mark.parametrize(
    "words",
    [("check", "rules", "petalsd.rules.yml"), ("test", "rules", "petalsd.rules.test.yml"),
     ("check", "config", "prometheus.yml")],
    ids=["rules", "tests", "config"],
)  # fmt: skip
def test_promtool_accepts(promtool: Path, words: tuple[str, ...]) -> None:
    status, text = check(promtool, *words)
    assert status == 0, text
    assert "SUCCESS" in text


def test_the_tests_of_the_rules_can_fail(promtool: Path, tmp_path: Path) -> None:
    """With other thresholds they do."""
    changed = RULES.read_text().replace("> 0.95", "> 0.999").replace('up{job="petalsd"} == 0', "up == 2")
    (tmp_path / RULES.name).write_text(changed)
    shutil.copy(PROMETHEUS / "petalsd.rules.test.yml", tmp_path)
    status, text = check(promtool, "test", "rules", "petalsd.rules.test.yml", cwd=tmp_path)
    assert status != 0
    assert "PetalsdCacheFull" in text
    assert "PetalsdDown" in text


def test_every_alert_is_tested_both_ways() -> None:
    """A time at which it fires, and one at which it is silent although its series are there."""
    tests = yaml.safe_load((PROMETHEUS / "petalsd.rules.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules("alert")}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


@pytest.mark.parametrize("rule", list(rules("alert")), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    """It names the instance, how bad it is, and the next command or key."""
    assert rule["alert"].startswith("Petalsd")
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "action"}
    assert "$labels.instance" in rule["annotations"]["summary"]


def test_rules_ask_for_metrics_that_exist(exposed: set[str]) -> None:
    for rule in (*rules("alert"), *rules("record")):
        names = metrics_of(rule["expr"])
        assert names <= exposed | SYNTHETIC, rule
    recorded = {rule["record"] for rule in rules("record")}
    used = {name for rule in rules("alert") for name in re.findall(r"\binstance:[a-z0-9_:]+", rule["expr"])}
    assert used <= recorded


def test_rules_ask_for_label_values_that_exist() -> None:
    """Warnings, states, and the labels themselves."""
    text = RULES.read_text()
    for codes in re.findall(r'petalsd_warning_active\{[^}]*code!?=~?"([^"]+)"', text):
        assert set(codes.split("|")) <= set(KINDS)
    for states in re.findall(r'petalsd_state\{state=~?"([^"]+)"', text):
        assert set(states.split("|")) <= {state.value for state in DaemonState}
    for name, matchers in re.findall(r"\b(petalsd_[a-z_]+)\{([^}]*)\}", text):
        family = FAMILIES[re.sub(r"_(?:bucket|sum|count)$", "", name.removeprefix(PREFIX))]
        used = set(re.findall(r"([a-z_]+)[=!]", matchers))
        assert used <= {*family.labels, "le", "job", "instance"}, name


@pytest.mark.parametrize(("panel", "expression"), dashboard_queries())
def test_the_dashboard_asks_for_metrics_that_exist(panel: str, expression: str, exposed: set[str]) -> None:
    names = metrics_of(as_promql(expression))
    assert names, panel
    assert names <= exposed | SYNTHETIC, panel


def test_the_dashboards_queries_are_promql(promtool: Path, tmp_path: Path) -> None:
    """Each as a recording rule, since that is what promtool parses."""
    queries = [as_promql(expression) for _, expression in dashboard_queries()]
    made = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": made}]}))
    status, text = check(promtool, "check", "rules", "queries.yml", cwd=tmp_path)
    assert status == 0, text
    assert f"{len(queries)} rules found" in text


def test_the_dashboard_shows_every_metric() -> None:
    """An operator who looks at it misses nothing."""
    shown = {name for _, query in dashboard_queries() for name in metrics_of(as_promql(query))}
    bare = {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in shown}
    missing = (
        {PREFIX + name for name in FAMILIES} - bare - {"petalsd_state_age_seconds", "petalsd_kv_free_pages"}
    )
    assert missing == set()


def test_the_dashboard_is_made_as_grafana_wants_it() -> None:
    """Panels have ids of their own, a place that overlaps nothing, a title, a unit and a data source to choose."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance"]
    assert dashboard["id"] is None
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        if panel["type"] in ("timeseries", "stat", "bargauge"):
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert "$instance" in target["expr"], panel["title"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_no_series_names_a_peer(exposition: str) -> None:
    """Neither a label nor a value, though the daemon has a peer id and talks to others."""
    assert "Qm" not in exposition and "12D3" not in exposition
    labels = set(re.findall(r"[{,]([a-z_]+)=", exposition))
    assert not [label for label in labels if re.search("peer|session|client|addr", label)]


def test_the_number_of_series_is_bounded(exposition: str) -> None:
    """Some hundred, whatever happens: they are all there from the start."""
    assert len([line for line in exposition.splitlines() if not line.startswith("#")]) < 800
