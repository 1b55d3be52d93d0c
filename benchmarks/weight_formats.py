"""What the forms of weights and cache cost in accuracy on the demo model: the tables of docs/quantization.md.

    python -m benchmarks.weight_formats [--tier auto]

Perplexity over the whole text, then the errors of single blocks. Some seconds for each form and table.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.quiet import quiet_libraries
from tests.models.demo_numerics import BFLOAT16, FLOAT32, FORMS, INT4, INT8, INT8_KV, DemoNumerics

DEMO_MODEL = Path(os.environ.get("PETALSD_DEMO_MODEL", ".cache/demo-model"))


def main() -> None:
    parser = argparse.ArgumentParser(description="What the forms of weights cost in accuracy.")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--tier", default="auto", help="kernels of petalsd, see petalsd/_C.pyi")
    options = parser.parse_args()
    quiet_libraries()
    numerics = DemoNumerics(options.model.resolve(), options.tier)
    print_perplexities(numerics)
    print_block_errors(numerics)


def print_perplexities(numerics: DemoNumerics) -> None:
    expected = numerics.perplexity(FLOAT32)
    print(f"Perplexity over {len(numerics.ids)} tokens, float32 {expected:.3f}\n")
    print("| weights, dtype, cache | perplexity | against float32 |\n|---|---|---|")
    for form in FORMS[1:]:
        perplexity = numerics.perplexity(form)
        print(f"| {form} | {perplexity:.3f} | {100 * (perplexity / expected - 1):+.2f} % |", flush=True)


def print_block_errors(numerics: DemoNumerics) -> None:
    forms = (BFLOAT16, INT8, INT4, INT8_KV)
    errors = [numerics.block_errors(form) for form in forms]
    print("\nErrors in % of a block's output, and of what it adds to its input\n")
    print("| block |", " | ".join(map(str, forms)), "|")
    print("|---" * (1 + len(forms)) + "|")
    for block, row in enumerate(zip(*errors, strict=True)):
        cells = (f"{100 * error.of_output:.2f}, {100 * error.of_added:.2f}" for error in row)
        print(f"| {block} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
