"""Every kernel that a supported model can ask for, compiled for all targets: its code stays within limits.

Its figures are those of compiled.json, which ``python -m benchmarks.gpu.compilation --write`` makes. What would be
compiled as it was then is compiled again only one time in sixteen, or with PETALSD_TEST_COMPILATION=all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from benchmarks.gpu import compilation
from benchmarks.gpu.compilation import figures_by_digest, launches_of, plan_of
from benchmarks.gpu.compiled_table import Compiled, Table, differences, read_table, write_table
from benchmarks.gpu.sass import Figures, count_instructions
from benchmarks.gpu.variants import TARGETS, Limits, Matrix, all_variants
from tests.device import interpreted

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "compiled.json"
COMPILING_S = 900
FINE = Figures(64, 0, 0, 32768, 900, 8, 0, 4, 0, {"HMMA.BF16": 32})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Table:
    path = tmp_path_factory.mktemp("compiled") / "table.json"
    known = [] if os.environ.get("PETALSD_TEST_COMPILATION") == "all" else ["--known", str(GOLDEN)]
    run_compiling("-m", "benchmarks.gpu.compilation", *known, "--write", str(path))
    return read_table(path)[1]


def run_compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process whose kernels are not interpreted."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=COMPILING_S, check=False,
    )  # fmt: skip
    assert result.returncode in (0, 1), result.stdout[-2000:] + result.stderr[-2000:]
    return result


@pytest.mark.slow
@pytest.mark.timeout(COMPILING_S + 10)
def test_the_code_of_every_kernel_is_within_its_limits(compiled: Table) -> None:
    """On all targets: no spill, no stack, registers, shared memory, asynchronous loads, matrix instructions."""
    problems = []
    for variant in all_variants().values():
        for name in launches_of(variant, variant.targets[0]):
            assert set(compiled[name]) == {str(target) for target in variant.targets}
            for target, one in compiled[name].items():
                found = variant.limits.violations(one.figures, int(target))
                problems += [f"{name}, sm_{target}: {problem}" for problem in found]
    assert problems == []


@pytest.mark.slow
@pytest.mark.timeout(COMPILING_S + 10)
def test_figures_are_those_that_were_accepted(compiled: Table) -> None:
    """Within a tenth, for the version of Triton that they were taken with."""
    version, golden = read_table(GOLDEN)
    if version != triton.__version__:
        pytest.skip(f"the figures are of triton {version}, this is {triton.__version__}")
    assert list(differences(golden, compiled)) == []


def test_a_name_that_no_kernel_has_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a misspelt one would be within all limits."""
    monkeypatch.setattr(sys, "argv", ["compilation", "--only", "decode Lama"])
    with pytest.raises(SystemExit, match="2"):
        compilation.main()
    assert "no kernel's name contains 'decode Lama'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("worse", "problem"),
    [
        (replace(FINE, registers=129), "129 registers, 128 are allowed"),
        (replace(FINE, spills=2), "2 loads and stores of spilled registers"),
        (replace(FINE, stack_bytes=16), "16 bytes of stack"),
        (replace(FINE, shared_bytes=(99 << 10) + 1), "101376 are there"),
        (replace(FINE, matrix={"HMMA.BF16": 16, "HMMA": 16}), "expected HMMA.BF16"),
        (replace(FINE, matrix={}), "expected HMMA.BF16"),
        (replace(FINE, async_wide_loads=0), "no asynchronous copies of 16 bytes"),
        (replace(FINE, async_narrow_loads=1), "1 asynchronous copies of less than 8 bytes"),
    ],
)
def test_what_exceeds_a_limit_is_named(worse: Figures, problem: str) -> None:
    """Each limit finds what it is there for, and nothing in code that is fine."""
    limits = Limits(128, Matrix.FEW_ROWS, is_async=True)
    assert limits.violations(FINE, 86) == []
    assert [problem in found for found in limits.violations(worse, 86)] == [True]


def test_large_products_need_the_instructions_of_their_target() -> None:
    """Warp groups' on sm_90, tensor memory's on sm_100, and none at all in what multiplies no matrices."""
    kinds = {80: "HMMA.BF16", 86: "HMMA.BF16", 89: "HMMA.BF16", 90: "HGMMA.BF16", 100: "UTCHMMA"}
    assert {target: Matrix.MANY_ROWS.expected(target) for target in TARGETS} == kinds
    assert Limits().violations(replace(FINE, matrix={}), 80) == []
    assert len(Limits().violations(FINE, 80)) == 1


def test_instructions_are_told_apart_by_their_modifiers() -> None:
    """Widths of loads, and types of matrix operands."""
    code = [
        "LDG.E.128.CONSTANT", "LDG.E.64", "LDG.E.U16", "LDG.E", "LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS.E.LTC128B",
        "LDGSTS.E.64", "STL.64", "LDL", "HMMA.16816.F32.BF16", "HMMA.16816.F32", "HGMMA.64x128x16.F32.BF16",
        "UTCHMMA", "IMAD.MOV.U32",
    ]  # fmt: skip
    assert count_instructions(code, 40, 8, 100) == Figures(
        40, 8, 2, 100, 14, 1, 1, 2, 2, {"HGMMA.BF16": 1, "HMMA": 1, "HMMA.BF16": 1, "UTCHMMA": 1}
    )


def test_tables_differ_where_figures_do(tmp_path: Path) -> None:
    """By more than a tenth, small numbers by more than 4; and where only one has a kernel or a target."""
    fine = Compiled("1f", FINE)
    write_table(tmp_path / "table.json", {"norm": {"80": fine, "90": fine}, "rope": {"80": fine}})
    version, table = read_table(tmp_path / "table.json")
    assert version == triton.__version__ and list(differences(table, table)) == []
    near = Compiled("2e", replace(FINE, registers=70, instructions=985, wide_loads=0))
    assert list(differences(table, {**table, "norm": {"80": fine, "90": near}})) == []
    far = Compiled("3d", replace(FINE, registers=71, matrix={"HMMA": 32}))
    assert list(differences(table, {"norm": {"80": far}, "silu": {"80": fine}})) == [
        "norm, sm_90: only expected",
        "norm, sm_80: HMMA 0 -> 32",
        "norm, sm_80: HMMA.BF16 32 -> 0",
        "norm, sm_80: registers 64 -> 71",
        "rope, sm_80: only expected",
        "silu, sm_80: only found",
    ]


def test_one_in_sixteen_is_compiled_although_it_is_known() -> None:
    table = {"norm": {str(plan): Compiled(f"{plan:x}", FINE) for plan in range(0xA0, 0xC0)}}
    assert set(figures_by_digest(table)) == {f"{plan:x}" for plan in range(0xA0, 0xC0)} - {"a0", "b0"}


@pytest.mark.timeout(COMPILING_S + 10)
def test_a_plan_is_known_by_all_that_it_follows_from(tmp_path: Path) -> None:
    """Source, constants, options and target. Nothing is compiled for it."""
    code = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from square_kernel import square_kernel
from benchmarks.gpu.compilation import plan_of
from petalsd.ops.launching import Launch, Options
def digest(size=64, target=80, precision="ieee", options=Options()):
    x = torch.empty(size, size, device="meta")
    return plan_of(Launch(square_kernel, (1,), (x, x), {"PRECISION": precision}, options), target).digest
print(digest(), digest(32), digest(target=90), digest(precision="tf32"), digest(options=Options(num_warps=8)))
"""
    source = Path(__file__).with_name("square_kernel.py")
    first = run_compiling("-c", code, str(source.parent)).stdout.split()
    assert first[0] == first[1] and len(set(first)) == 4
    (tmp_path / source.name).write_text(source.read_text().replace("* 64 +", "* 32 +"))
    changed = run_compiling("-c", code, str(tmp_path)).stdout.split()
    assert len(changed) == 5 and set(changed).isdisjoint(first)


@pytest.mark.timeout(COMPILING_S + 10)
def test_what_is_compiled_follows_from_the_arguments() -> None:
    """A stride that is no multiple of 16 costs the wide loads: which is why launchers refuse it."""
    code = """
from dataclasses import replace
from benchmarks.gpu.compilation import launches_of, figures_of, prepare_cache
from benchmarks.gpu.variants import all_variants
prepare_cache()
(launch,) = launches_of(all_variants()["norm 4096"], 80).values()
arguments = [4100 if isinstance(value, int) else value for value in launch.arguments]
odd = replace(launch, arguments=tuple(arguments))
found = [figures_of(one, 80) for one in (launch, odd)]
print([(figures.wide_loads, figures.narrow_loads > 8) for figures in found])
"""
    result = run_compiling("-c", code)
    assert result.stdout.strip() == "[(4, False), (2, True)]", result.stderr


@pytest.mark.nightly
@pytest.mark.timeout(COMPILING_S + 10)
def test_products_that_round_their_operands_are_found() -> None:
    """float32 by TF32, on all generations of matrix units; "ieee" has none, and limits allow none anywhere."""
    code = """
import torch
from benchmarks.gpu.compilation import figures_of, prepare_cache
from petalsd.ops.launching import Launch, Options
from tests.kernels.square_kernel import square_kernel
prepare_cache()
x = torch.empty(64, 64, device="meta")
for precision in ("tf32", "ieee"):
    launch = Launch(square_kernel, (1,), (x, x), {"PRECISION": precision}, Options())
    print(["TF32" in figures_of(launch, target).matrix for target in (80, 90, 100)])
"""
    result = run_compiling("-c", code)
    assert result.stdout.split("\n")[:2] == ["[True, True, True]", "[False, False, False]"], result.stderr
    for limits in (Limits(128, Matrix.FEW_ROWS), Limits()):
        matrix = {kind: 8 for kind in (limits.matrix.expected(80), "TF32") if kind}
        assert len(limits.violations(replace(FINE, matrix=matrix), 80)) == 1


def test_float8_is_not_asked_of_devices_without_it() -> None:
    """Its conversions do not compile for them."""
    targets = {variant.targets for name, variant in all_variants(is_full=True).items() if "float8" in name}
    assert targets == {(89, 90, 100)}


@interpreted
def test_an_interpreted_kernel_is_not_compiled() -> None:
    """In this process kernels are interpreted; the error says so."""
    (launch,) = launches_of(all_variants()["norm 4096"], 80).values()
    with pytest.raises(TypeError, match="add_norm_kernel is interpreted here: unset TRITON_INTERPRET"):
        plan_of(launch, 80)
