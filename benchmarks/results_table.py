"""The results of the last runs, as the summary and the pictures look figures up in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Figure: TypeAlias = Mapping[str, Any]
"""A row as ``report.flatten`` makes it."""


class ResultsTable:
    """All rows of the documents that ``report.read_results`` gives, and which of them were looked up."""

    def __init__(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        self._documents = documents
        self._found: set[str] = set()

    def rows(self, benchmark: str, metric: str, provider: str, **setting: int | str) -> list[Figure]:
        """Those of this metric and provider whose setting contains ``setting``, as they were measured."""
        document = self._documents.get(benchmark, {"rows": []})
        rows = [
            row
            for row in document["rows"]
            if (row["metric"], row["provider"]) == (metric, provider)
            and setting.items() <= row["setting"].items()
        ]
        if rows:
            self._found.add(benchmark)
        return rows

    def row(self, benchmark: str, metric: str, provider: str, **setting: int | str) -> Figure | None:
        """The first of these; None where none was measured."""
        rows = self.rows(benchmark, metric, provider, **setting)
        return rows[0] if rows else None

    def best(self, benchmark: str, metric: str, provider: str, **setting: int | str) -> Figure | None:
        """The best of these, over whatever ``setting`` leaves open."""
        rows = self.rows(benchmark, metric, provider, **setting)
        if not rows:
            return None
        pick = min if rows[0]["is_lower_better"] else max
        return pick(rows, key=lambda row: float(row["median"]))

    def runs(self) -> list[str]:
        """A benchmark of each run that rows were found of so far: of each processor, torch and commit."""
        firsts: dict[tuple[str, ...], str] = {}
        for benchmark in self._documents:
            if benchmark in self._found:
                facts = self.machine(benchmark)
                key = tuple(facts[name] for name in ("cpu", "cores", "torch", "commit"))
                firsts.setdefault(key, benchmark)
        return list(firsts.values())

    def machine(self, benchmark: str) -> Mapping[str, str]:
        """What the benchmark ran on; empty where it did not run."""
        return self._documents.get(benchmark, {"machine": {}})["machine"]

    def bandwidth(self, benchmark: str, threads: int) -> float | None:
        """GB/s that the memory gave to this number of threads in that run."""
        measured = self._documents.get(benchmark, {}).get("bandwidth", {}).get("gb_per_s", {})
        return measured.get(str(threads))
