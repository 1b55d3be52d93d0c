"""``petalsd check`` on real model directories, good and bad."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

from petalsd.cli.exit_codes import EXIT_BAD_CONFIG, EXIT_OK
from petalsd.cli.main import main
from tests.tiny_models import make_tiny


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama; HOME is a fresh directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("STATE_DIRECTORY", "CACHE_DIRECTORY", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "tiny-llama"
    make_tiny("llama", path)
    return path


def check(capsys: pytest.CaptureFixture[str], source: Path, *overrides: str) -> tuple[int, dict[str, str]]:
    """Exit code, and the text of each finding; bad ones begin with BAD."""
    words = ["check", "--json", "--instance", "t", "--set", f"model.source={source}"]
    for override in overrides:
        words += ["--set", override]
    code = main(words)
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {item["name"]: ("" if item["is_ok"] else "BAD ") + item["text"] for item in findings}


def test_a_good_configuration_passes(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every finding is good, says what was found, and nothing was written."""
    code, findings = check(capsys, model_dir, "blocks.span=1:3", "engine.device=cpu")
    assert code == EXIT_OK, findings
    assert findings["model"].startswith("tiny-llama: llama, ")
    assert findings["blocks"].startswith("2 of ")
    assert "(1:3)" in findings["blocks"]
    assert findings["device"] == "cpu, bfloat16"
    assert "sessions up to 8192 tokens" in findings["limits"]
    assert findings["identity"].endswith("identity.key will be made")
    assert (
        re.search(r"up to \d+\.\d MiB in ", findings["spill file"]) or "in memory" in findings["spill file"]
    )
    assert findings["swarm"] == "a private swarm of our own"
    assert findings["control group"].endswith(" may act")
    assert findings["control socket"].endswith("/control.sock")
    assert "metrics" not in findings
    assert not (model_dir.parent / "home").exists()


def test_quantized_weights_are_named(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The finding on the device says in what form weights are kept."""
    code, findings = check(capsys, model_dir, "model.quantization=int4", "engine.device=cpu")
    assert code == EXIT_OK, findings
    assert findings["device"] == "cpu, bfloat16 with int4 weights"


# A torch for CUDA that sees no device may see one after the next start: what it saw is gone, or not there yet.
IS_LOST = torch.version.cuda is not None and not torch.cuda.is_available()
NO_SUCH_DEVICE = "BAD cudaErrorNoDevice" if IS_LOST else "BAD engine.device = 'cuda:99': torch"


@pytest.mark.parametrize(
    ("override", "name", "text"),
    [
        ("blocks.span=0:99", "blocks", "BAD blocks.span = 0:99: tiny-llama has the blocks 0:"),
        ("engine.kv_tokens=100000000000", "blocks", "BAD "),
        ("engine.device=cuda:99", "model", NO_SUCH_DEVICE),
        ("model.dtype=float16", "model", "BAD "),
        (
            "model.token_file=/nonexistent/token",
            "model",
            "BAD model.token_file = /nonexistent/token: No such",
        ),
        ("swarm.identity_path=/dev/null/key", "identity", "BAD /dev/null: is not a directory"),
        ("model.dht_prefix=a.b", "model", "BAD "),
        (
            "control.group=no-such-group",
            "control group",
            "BAD control.group = 'no-such-group': there is no such group",
        ),
        (
            "control.socket=/dev/null",
            "control socket",
            "BAD control.socket = /dev/null: there is something else",
        ),
        (
            f"control.socket=/tmp/{'d' * 60}/{'n' * 86}",
            "control socket",
            f"BAD control.socket = /tmp/{'d' * 60}/{'n' * 86}: the file name has 86 bytes",
        ),
        ("control.socket=/dev/null/x/y.sock", "control socket", "BAD /dev/null: is not a directory"),
        ("metrics.listen=192.0.2.7:9464", "metrics", "BAD metrics.listen = '192.0.2.7:9464': Cannot assign"),
        (
            "metrics.listen=no-such-host.invalid:9464",
            "metrics",
            "BAD metrics.listen = 'no-such-host.invalid:",
        ),
        (
            "engine.kv_spill_bytes=1000000TB",
            "spill file",
            "BAD engine.kv_spill_bytes = 1000000000000000000: ",
        ),
    ],
)
def test_what_would_not_serve_is_found(
    model_dir: Path, capsys: pytest.CaptureFixture[str], override: str, name: str, text: str
) -> None:
    """Exit 78 and a finding that names the problem."""
    code, findings = check(capsys, model_dir, "engine.device=cpu", override)
    assert code == EXIT_BAD_CONFIG
    assert findings[name].startswith(text), findings


def test_the_port_of_a_running_daemon_is_no_problem(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is checked before a reload, while the daemon that it belongs to listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = f"127.0.0.1:{server.getsockname()[1]}"
        code, findings = check(capsys, model_dir, "engine.device=cpu", f"metrics.listen={listen}")
    assert code == EXIT_OK, findings
    assert findings["metrics"].startswith(f"{listen}, taken at the moment")


def test_a_count_that_does_not_fit_says_how_many_do(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory of weights and cache is compared with what there is."""
    overrides = ["engine.kv_tokens=100000000000", "blocks.count=2", "engine.device=cpu"]
    code, findings = check(capsys, model_dir, *overrides)
    assert code == EXIT_BAD_CONFIG
    assert findings["blocks"].startswith("BAD 2 of ")
    assert "0 blocks fit; or lower engine.kv_tokens" in findings["blocks"]


def test_a_model_that_cannot_be_read_is_found(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are not there, an unknown family, and rotary angles that are no numbers."""
    config_file = model_dir / "config.json"
    content = json.loads(config_file.read_text())
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    code, findings = check(capsys, model_dir)
    assert code == EXIT_BAD_CONFIG
    assert findings["weights"].startswith("BAD ")
    assert "safetensors" in findings["weights"]
    config_file.write_text(json.dumps(content | {"model_type": "gpt2"}))
    code, findings = check(capsys, model_dir)
    assert findings["model"].startswith("BAD model_type = 'gpt2' is not served")
    rope = {"rope_type": "default", "rope_theta": 0.0}
    config_file.write_text(json.dumps(content | {"rope_parameters": rope}))
    code, findings = check(capsys, model_dir)
    assert findings["model"].startswith("BAD rope_parameters = ")


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "of another model"])
def test_damaged_weights_in_a_directory_are_found(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """A shard that could not be loaded is named, unless the pinned blocks lie elsewhere."""
    sharded = tmp_path / "sharded"
    make_tiny("llama", sharded, max_shard_size="100KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    shard = sharded / index["model.layers.2.mlp.down_proj.weight"]
    whole = shard.read_bytes()
    shard.unlink()
    if damage == "cut short":
        shard.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        shard.touch()
    elif damage == "of another model":
        shutil.copy(sharded / index["model.layers.0.mlp.down_proj.weight"], shard)
    code, findings = check(capsys, sharded, "engine.device=cpu")
    assert code == EXIT_BAD_CONFIG
    assert findings["weights"].startswith(f"BAD {shard.name} "), findings
    assert "copy" in findings["weights"]
    code, findings = check(capsys, sharded, "engine.device=cpu", "blocks.span=0:1")
    assert code == EXIT_OK, findings


def test_without_json_the_findings_are_for_people(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line per finding, ok or BAD in front, and a last sentence when it would not serve."""
    words = ["check", "-i", "t", "--set", f"model.source={model_dir}", "--set", "blocks.span=0:99"]
    assert main(words) == EXIT_BAD_CONFIG
    captured = capsys.readouterr()
    assert any(line.startswith("ok   model ") for line in captured.out.splitlines())
    assert any(line.startswith("BAD  blocks ") for line in captured.out.splitlines())
    assert "would not serve" in captured.err


def test_of_a_bootstrap_node_nothing_of_a_model_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is what it writes to, and how it is reached and steered."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "boot.toml"
    file.write_text('[daemon]\nrole = "bootstrap"\n')
    assert main(["check", "-c", str(file), "--json"]) == EXIT_OK
    names = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert names == ["identity", "state directory", "swarm", "control group", "control socket"]
