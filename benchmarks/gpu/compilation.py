"""Compiles every kernel that a supported model can ask for, without a GPU, and holds the code to limits.

    python -m benchmarks.gpu.compilation [--only TEXT] [--targets 80 90] [--full] [--write FILE]

A variant calls a launcher on tensors without memory; what it would launch is compiled on the way that every launch
takes, so that alignments and divisibilities are those of a real one. --full adds the shapes of all models to
those that the tests compile. Exit status 1 when a limit is exceeded. Results are kept by a hash of the source in
.cache/kernels; tests/kernels/compiled.json has those that the tests expect.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.gpu import sass
from benchmarks.gpu.compiled_table import Table, write_table
from benchmarks.gpu.sass import Figures, read_figures
from benchmarks.gpu.variants import TARGETS, Variant, all_variants
from petalsd.ops.launching import Launch, record_launches

CACHE = Path(".cache/kernels")
READER = hashlib.sha256(Path(sass.__file__).read_bytes()).hexdigest()[:16]
_READERS = 2
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


def compile_launch(launch: Launch, target: int) -> Any:
    """The compiled kernel that this launch would start on a device of that compute capability.

    TypeError in a process whose kernels are interpreted.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise TypeError(f"{launch.kernel.__name__} is interpreted here: unset TRITON_INTERPRET")
    triton.runtime.driver.set_active(OfflineDriver(target))
    return launch.kernel.run(
        *launch.arguments,
        grid=launch.grid,
        warmup=True,
        **launch.constants,
        **launch.options.keywords,
    )


def figures_of(launch: Launch, target: int) -> Figures:
    return figures_of_kernel(compile_launch(launch, target))


def figures_of_kernel(compiled: Any) -> Figures:
    """From its machine code, or from the cache."""
    kept = CACHE / f"{compiled.hash}-{READER}.json"
    if kept.exists():
        return Figures(**json.loads(kept.read_text()))
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        figures = read_figures(cubin, compiled.asm["ptx"], TOOLS, compiled.metadata.shared)
    unfinished = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    unfinished.write_text(json.dumps(dataclasses.asdict(figures)))
    unfinished.rename(kept)
    return figures


def launches_of(variant: Variant, target: int) -> dict[str, Launch]:
    """What it launches there, by name: that of the variant, and of the kernel where there are several."""
    with record_launches(target) as launches:
        variant.call()
    if len(launches) == 1:
        return {variant.name: launches[0]}
    return {f"{variant.name}, {launch.kernel.__name__}": launch for launch in launches}


def compile_all(
    variants: Mapping[str, Variant], targets: tuple[int, ...]
) -> Iterator[tuple[str, Variant, int, Figures]]:
    """Code is read, which another process does, while the next kernels are compiled."""
    pending: deque[tuple[str, Variant, int, Future[Figures]]] = deque()
    wanted = (
        (name, variant, launch, target)
        for variant in variants.values()
        for target in targets
        if target in variant.targets
        for name, launch in launches_of(variant, target).items()
    )
    with ThreadPoolExecutor(_READERS) as readers:
        for name, variant, launch, target in wanted:
            compiled = compile_launch(launch, target)
            pending.append((name, variant, target, readers.submit(figures_of_kernel, compiled)))
            if len(pending) > _READERS:
                yield _read(pending.popleft())
        yield from map(_read, pending)


def _read(pending: tuple[str, Variant, int, Future[Figures]]) -> tuple[str, Variant, int, Figures]:
    *what, figures = pending
    return (*what, figures.result())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--full", action="store_true", help="the shapes of all models")
    parser.add_argument("--write", type=Path, help="the figures as JSON")
    options = parser.parse_args()
    prepare_cache()
    chosen = {name: one for name, one in all_variants(options.full).items() if options.only in name}
    table: Table = {}
    problems = 0
    for name, variant, target, figures in compile_all(chosen, tuple(options.targets)):
        table.setdefault(name, {})[str(target)] = figures
        violations = variant.limits.violations(figures, target)
        problems += len(violations)
        print(_line(name, target, figures), *violations, sep="\n    ", flush=True)
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
