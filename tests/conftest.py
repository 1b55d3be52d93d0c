"""What every test gets: one thread for torch, and nothing of another test's logging set-up."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import structlog

from petalsd.imports import heavy_imports

# Read when torch is imported, here and in the processes that tests start. The models of the tests are tiny: more
# threads only wait for each other, and take the cores from the tests beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when a kernel is defined: it then runs in Triton's interpreter. Compiling kernels, or running them on a GPU,
# takes a process without it. ``tests.device`` tells of the other way.
if os.environ.get("PETALSD_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    # Only now: it imports Triton, which defines functions of its own.
    from tests.interpreter import quicken_the_interpreter

    quicken_the_interpreter()

TESTS = Path(__file__).resolve().parent

# Longest first. Files are handed to processes in this order: a long one that begins last would keep a single core
# busy at the end.
LONG_FILES = (
    "csrc/test_sanitizers.py", "interop/test_benchmarks.py", "models/test_weight_formats.py",
    "client/test_live_generation.py", "systemd/test_faults.py", "interop/test_stock_server.py",
    "e2e/test_demo.py", "kernels/test_expert_layers.py", "engine/test_kernel_engine.py",
    "models/test_layer_block.py", "models/test_native_numerics.py", "systemd/test_package.py",
    "daemon/test_serving.py", "systemd/test_service.py", "engine/test_graphed_span.py",
    "e2e/test_real_model.py", "interop/test_stock_client.py", "interop/test_mixed_chain.py",
    "interop/test_mixed_balance.py", "engine/test_layer_graphs.py", "models/test_layer_span.py",
    "systemd/test_drain.py", "benchmarks/test_smoke_served.py", "kernels/test_expert_linear.py",
    "client/test_live_recovery.py", "models/test_kernel_span.py", "kernels/test_quantized_linear.py",
    "benchmarks/test_smoke_process.py", "layout/test_linters.py", "engine/test_capturing.py",
    "kernels/test_prefill_attention.py", "systemd/test_control.py", "daemon/test_swarm_live.py",
    "kernels/test_compilation.py", "systemd/test_surroundings.py", "systemd/test_reload.py",
    "engine/test_float8_cache.py", "swarm/test_node.py", "client/test_live_cli.py", "engine/test_adapters.py",
    "cli/test_main.py", "engine/test_device_loss.py",
)  # fmt: skip

# A property of tests that measure: a line for the end of the run. It travels with the report, from workers too.
FIGURE = "figure"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """To collect is to import everything."""
    with heavy_imports():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def logging_of_its_own() -> Iterator[None]:
    """structlog is configured per process; a program under test that does so must not change the next test.

    Tracebacks are plain: with the values of all variables, as is the default, one takes up to a second.
    """
    structlog.reset_defaults()
    *processors, _ = structlog.get_config()["processors"]
    console = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure([*processors, console])
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The directory of real weights."""
    path = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model")).resolve()
    if not (path / "config.json").exists():
        pytest.skip(f"the demo model is missing: {path} (make demo-model)")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    last = [report for report in reports if getattr(report, "when", None) == "teardown"]
    if figures := [text for report in last for name, text in report.user_properties if name == FIGURE]:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(figures))
