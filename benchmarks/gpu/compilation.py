"""Compiles every kernel that a supported model can ask for, without a GPU, and holds the code to limits.

    python -m benchmarks.gpu.compilation [--only TEXT] [--targets 80 90] [--full] [--known FILE] [--write FILE]

A variant calls a launcher on tensors without memory; what it would launch is compiled on the way that every launch
takes, so that alignments and divisibilities are those of a real one. --full adds the shapes of all models to
those that the tests compile. Exit status 1 when a limit is exceeded. Results are kept in .cache/kernels by a hash
of all that they follow from; tests/kernels/compiled.json has those that the tests expect. With --known, figures of
such a file whose hashes are still the same are taken from there, but for one in sixteen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.gpu.compiled_table import Compiled, Table, read_table, write_table
from benchmarks.gpu.plans import Plan, Planning
from benchmarks.gpu.sass import Figures, read_figures
from benchmarks.gpu.variants import TARGETS, Variant, all_variants
from petalsd.ops.launching import Launch, record_launches

CACHE = Path(".cache/kernels")
_READERS = 2
_SAMPLED = 16
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class OfflineDriver:
    """Stands for a CUDA driver with a device of compute capability ``target``, on which nothing can run."""

    def __init__(self, target: int) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._target, 32)

    def get_current_device(self) -> int:
        """A number of its own for each target: kernels are kept by device."""
        return self._target

    def get_current_stream(self, device: int) -> int:
        return 0


def prepare_cache() -> None:
    """Before anything is compiled."""
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE.resolve()))


def plan_of(launch: Launch, target: int) -> Plan:
    """Of the kernel that this launch would start on a device of that compute capability.

    TypeError in a process whose kernels are interpreted.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise TypeError(f"{launch.kernel.__name__} is interpreted here: unset TRITON_INTERPRET")
    triton.runtime.driver.set_active(OfflineDriver(target))
    with Planning():
        plan: Plan = launch.kernel.run(
            *launch.arguments,
            grid=launch.grid,
            warmup=True,
            **launch.constants,
            **launch.options.keywords,
        )
    return plan


def figures_of(launch: Launch, target: int) -> Figures:
    plan = plan_of(launch, target)
    return _kept(plan) or _read(plan)


def _kept(plan: Plan) -> Figures | None:
    kept = CACHE / f"{plan.digest}.json"
    return Figures(**json.loads(kept.read_text())) if kept.exists() else None


def _read(plan: Plan) -> Figures:
    """From its machine code."""
    compiled = plan.compile()
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        figures = read_figures(cubin, compiled.asm["ptx"], TOOLS, compiled.metadata.shared)
    unfinished = CACHE / f"{plan.digest}.{os.getpid()}-{threading.get_ident()}"
    unfinished.write_text(json.dumps(dataclasses.asdict(figures)))
    unfinished.rename(unfinished.with_suffix(".json"))
    return figures


def launches_of(variant: Variant, target: int) -> dict[str, Launch]:
    """What it launches there, by name: that of the variant, and of the kernel where there are several."""
    with record_launches(target) as launches:
        variant.call()
    if len(launches) == 1:
        return {variant.name: launches[0]}
    return {f"{variant.name}, {launch.kernel.__name__}": launch for launch in launches}


def compile_all(
    variants: Mapping[str, Variant], targets: tuple[int, ...], known: Mapping[str, Figures]
) -> Iterator[tuple[str, Variant, int, Compiled]]:
    """Code is read, which another process does, while the next kernels are compiled.

    known  figures by the digests of plans
    """
    pending: deque[tuple[str, Variant, int, Plan, Future[Figures]]] = deque()
    wanted = (
        (name, variant, target, plan_of(launch, target))
        for variant in variants.values()
        for target in targets
        if target in variant.targets
        for name, launch in launches_of(variant, target).items()
    )
    with ThreadPoolExecutor(_READERS) as readers:
        for name, variant, target, plan in wanted:
            pending.append((name, variant, target, plan, _start(plan, known, readers)))
            if len(pending) > _READERS:
                yield _finish(*pending.popleft())
        yield from (_finish(*one) for one in pending)


def _start(plan: Plan, known: Mapping[str, Figures], readers: ThreadPoolExecutor) -> Future[Figures]:
    if figures := known.get(plan.digest) or _kept(plan):
        done: Future[Figures] = Future()
        done.set_result(figures)
        return done
    plan.compile()
    return readers.submit(_read, plan)


def _finish(
    name: str, variant: Variant, target: int, plan: Plan, figures: Future[Figures]
) -> tuple[str, Variant, int, Compiled]:
    return name, variant, target, Compiled(plan.digest, figures.result())


def figures_by_digest(table: Table) -> dict[str, Figures]:
    """Of fifteen in sixteen kernels: those that are left out show that the same plans still give the same code."""
    every = (compiled for by_target in table.values() for compiled in by_target.values())
    return {one.plan: one.figures for one in every if int(one.plan, 16) % _SAMPLED}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--full", action="store_true", help="the shapes of all models")
    parser.add_argument(
        "--known", type=Path, help="figures that need not be found anew, as --write gave them"
    )
    parser.add_argument("--write", type=Path, help="the figures as JSON")
    options = parser.parse_args()
    chosen = {name: one for name, one in all_variants(options.full).items() if options.only in name}
    if not chosen:
        parser.error(f"no kernel's name contains {options.only!r}")
    prepare_cache()
    known = figures_by_digest(read_table(options.known)[1]) if options.known else {}
    table: Table = {}
    problems = 0
    for name, variant, target, compiled in compile_all(chosen, tuple(options.targets), known):
        table.setdefault(name, {})[str(target)] = compiled
        violations = variant.limits.violations(compiled.figures, target)
        problems += len(violations)
        print(_line(name, target, compiled.figures), *violations, sep="\n    ", flush=True)
    if options.write:
        write_table(options.write, table)
    return 1 if problems else 0


def _line(name: str, target: int, figures: Figures) -> str:
    matrix = ", ".join(f"{count} {kind}" for kind, count in figures.matrix.items())
    return (
        f"{name:<48} sm_{target:<4}{figures.registers:>4} registers {figures.shared_bytes:>7} bytes shared "
        f"{figures.async_wide_loads:>3} + {figures.async_narrow_loads} asynchronous, "
        f"{figures.wide_loads:>3} + {figures.narrow_loads} loads  {matrix}"
    )


if __name__ == "__main__":
    sys.exit(main())
