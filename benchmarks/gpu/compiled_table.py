"""The figures of all compiled kernels as a file, and in what two such files differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import triton

from benchmarks.gpu.sass import Figures


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one target: the digest of its plan, and what its code takes and does."""

    plan: str
    figures: Figures


Table: TypeAlias = dict[str, dict[str, Compiled]]
"""By name of a kernel and target."""

_TOLERANCE = 0.1
_ALWAYS_TOLERATED = 4


def write_table(path: Path, table: Table) -> None:
    """With a line for each kernel and target, so that changes can be read."""
    kernels = {
        name: {target: _dump(compiled) for target, compiled in by_target.items()}
        for name, by_target in table.items()
    }
    rows = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f'   "{target}": {figures}' for target, figures in by_target.items())
        + "\n  }"
        for name, by_target in kernels.items()
    ]
    body = ",\n".join(rows)
    path.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{body}\n }}\n}}\n')


def read_table(path: Path) -> tuple[str, Table]:
    """The version of Triton that the table is of, and the table."""
    content = json.loads(path.read_text())
    table = {
        name: {target: _load(fields) for target, fields in by_target.items()}
        for name, by_target in content["kernels"].items()
    }
    return content["triton"], table


def _dump(compiled: Compiled) -> str:
    return json.dumps({"plan": compiled.plan, **dataclasses.asdict(compiled.figures)})


def _load(fields: dict[str, Any]) -> Compiled:
    return Compiled(fields.pop("plan"), Figures(**fields))


def differences(expected: Table, found: Table) -> Iterator[str]:
    """Kernels and targets that only one has, and figures that differ by more than a tenth, and by more than 4.

    Different plans are none.
    """
    for name in sorted(set(expected) | set(found)):
        was, now = expected.get(name, {}), found.get(name, {})
        for target in sorted(set(was) ^ set(now)):
            yield f"{name}, sm_{target}: only {'expected' if target in was else 'found'}"
        for target in sorted(set(was) & set(now)):
            numbers = (_numbers(was[target].figures), _numbers(now[target].figures))
            for what in sorted(set(numbers[0]) | set(numbers[1])):
                before, after = numbers[0].get(what, 0), numbers[1].get(what, 0)
                if abs(after - before) > max(_ALWAYS_TOLERATED, _TOLERANCE * before):
                    yield f"{name}, sm_{target}: {what} {before} -> {after}"


def _numbers(figures: Figures) -> dict[str, int]:
    whole = dataclasses.asdict(figures)
    return {**whole.pop("matrix"), **whole}
