"""Finds the benchmarks: every module of suite/, so that a new one is a new file and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from benchmarks.benchmark import Benchmark

SUITE = Path(__file__).resolve().parent / "suite"


def find_benchmarks() -> dict[str, Benchmark]:
    """By name, in the order of the files' names."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(SUITE)]))
    found = [importlib.import_module(f"benchmarks.suite.{name}").BENCHMARK for name in names]
    return {benchmark.name: benchmark for benchmark in found}
