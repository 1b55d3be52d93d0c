"""What a compiled kernel takes and does, from its machine code: registers, memory, loads, matrix instructions."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 60
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)", re.MULTILINE)
_MATRIX = re.compile(r"^(?:HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|UTC\w*MMA)")
# Names of machine instructions do not tell it for all targets.
_TF32 = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?:mma|wgmma|tcgen05)\.\S*tf32", re.MULTILINE)
_WIDE = (".64", ".128", ".256")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one kernel, compiled for one target.

    registers           of a thread
    stack_bytes         of a thread
    spills              loads and stores of local memory, counted in the code
    shared_bytes        of a program, static and dynamic
    instructions        in the code
    async_wide_loads    asynchronous copies of 16 bytes from global to shared memory
    async_narrow_loads  those of less than 8 bytes
    wide_loads          loads of global memory of 8 bytes and more to registers
    narrow_loads        of less
    matrix              matrix instructions by name and type of their operands, as in ``HMMA.BF16``; and as
                        ``TF32`` those that the PTX code has on float32 operands, which lose 13 bits of them
    """

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    instructions: int
    async_wide_loads: int
    async_narrow_loads: int
    wide_loads: int
    narrow_loads: int
    matrix: dict[str, int]


def read_figures(cubin: Path, ptx: str, tools: Path, shared_bytes: int) -> Figures:
    """By CUDA's own tools in the directory ``tools``, but for ``ptx``. RuntimeError when they fail."""
    usage = _run(tools / "cuobjdump", "-res-usage", cubin)
    found = _RESOURCES.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {usage[:200]!r}")
    # Where jumps lead, which takes a fifth of its time to find, is not asked.
    opcodes = _OPCODE.findall(_run(tools / "nvdisasm", "--print-code", "--no-dataflow", cubin))
    figures = count_instructions(opcodes, int(found[1]), int(found[2]), shared_bytes)
    if rounded := len(_TF32.findall(ptx)):
        figures.matrix["TF32"] = rounded
    return figures


def count_instructions(
    opcodes: Iterable[str], registers: int, stack_bytes: int, shared_bytes: int
) -> Figures:
    """``opcodes`` with their modifiers, as in ``LDG.E.128.CONSTANT``."""
    counts = Counter(opcodes)

    def total(*names: str, width: tuple[str, ...] = ()) -> int:
        """Of these instructions; with ``width``, of those that have one of these modifiers."""
        return sum(
            count
            for opcode, count in counts.items()
            if opcode.split(".")[0] in names
            and (not width or any(f"{opcode}.".count(f"{w}.") for w in width))
        )

    matrix: Counter[str] = Counter()
    for opcode, count in counts.items():
        if _MATRIX.match(opcode):
            matrix[opcode.split(".")[0] + (".BF16" if ".BF16" in opcode else "")] += count
    return Figures(
        registers=registers,
        stack_bytes=stack_bytes,
        spills=total("LDL", "STL"),
        shared_bytes=shared_bytes,
        instructions=counts.total(),
        async_wide_loads=total("LDGSTS", width=(".128",)),
        async_narrow_loads=total("LDGSTS") - total("LDGSTS", width=_WIDE),
        wide_loads=total("LDG", width=_WIDE),
        narrow_loads=total("LDG") - total("LDG", width=_WIDE),
        matrix=dict(sorted(matrix.items())),
    )


def _run(tool: Path, *arguments: str | Path) -> str:
    result = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{tool.name} failed: {result.stderr.strip()[:500]}")
    return result.stdout
