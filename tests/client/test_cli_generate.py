"""``petalsd generate``: its arguments and the figures it prints."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.cli import generate
from petalsd.client.tokenizer import encode_chat, encode_text, load_tokenizer
from petalsd.errors import WeightsError
from tests.tiny_models import make_tokenizer


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    return parser.parse_args([*words])


BASE = ("--model", "m", "--peers", "/ip4/1.2.3.4/tcp/1/p2p/Qm")


@pytest.mark.parametrize("words", [("hello", *BASE), (*BASE, "hello"), (*BASE, "--chat", "hello")])
def test_the_prompt_may_stand_anywhere(words: tuple[str, ...]) -> None:
    """Also right behind the peers, which would take it for one of them."""
    arguments = parse(*words)
    assert generate._take_prompt(arguments) == "hello"
    assert arguments.peers == [BASE[-1]]


def test_the_prompt_may_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """``-`` reads it."""
    piped = io.TextIOWrapper(io.BytesIO("aus der Röhre".encode()), "ascii", "surrogateescape")
    monkeypatch.setattr("sys.stdin", piped)
    assert generate._take_prompt(parse("-", *BASE)) == "aus der Röhre"


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [
        (io.TextIOWrapper(io.BytesIO(b"a\xff")), "standard input cannot be read: 'utf-8' codec can't"),
        (None, "PROMPT is missing"),
    ],
    ids=["no text", "closed"],
)
def test_a_standard_input_that_holds_no_text(
    stdin: object, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage, and no traceback out of a tokenizer."""
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(SystemExit):
        generate._take_prompt(parse("-", *BASE))
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        BASE,
        ("hello", "--model", "m"),
        ("hello", *BASE, "--max-new-tokens", "0"),
        ("hello", *BASE, "--temperature", "-1"),
        ("hello", *BASE, "--temperature", "nan"),
        ("hello", *BASE, "--top-p", "0"),
    ],
)
def test_bad_usage_exits_with_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything heavy is imported or anybody is called."""
    with pytest.raises(SystemExit) as caught:
        generate._take_prompt(parse(*words))
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        ("/ip4/127.0.0.1/tcp/31337", "an initial peer ends in /p2p/ and its PeerID"),
        ("nonsense", "a multiaddr is text as in /ip4/"),
        ("/ip4/1.2.3.4/tcp/99999/p2p/Qm", "'99999' is no port"),
    ],
)
def test_a_bad_address_is_bad_usage(peer: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Told at once, and not as a libp2p daemon that does not start."""
    with pytest.raises(SystemExit) as caught:
        generate.run(parse("hello", "--model", "m", "--peers", peer))
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--max-new-tokens", "--temperature", "--top-p", "--seed"])
def test_what_is_no_number_is_told_in_words(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse would name the function that reads it."""
    with pytest.raises(SystemExit):
        parse("hello", *BASE, option, "many")
    assert f"argument {option}: 'many' is no" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "number"), [("--max-new-tokens", 1 << 64), ("--seed", 1 << 64)])
def test_numbers_beyond_all_measure(option: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """They would fail where they are packed, with a traceback."""
    with pytest.raises(SystemExit):
        parse("hello", *BASE, option, str(number))
    assert f"argument {option}: '{number}' is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {"max_new_tokens": 128, "do_sample": False, "num_beams": 1}),
        (
            ("--temperature", "0.5", "--top-p", "0.9", "--max-new-tokens", "3"),
            {"max_new_tokens": 3, "do_sample": True, "num_beams": 1, "temperature": 0.5, "top_p": 0.9},
        ),
    ],
)
def test_a_temperature_means_sampling(words: tuple[str, ...], expected: dict[str, object]) -> None:
    """Without one the likeliest token is taken, whatever the model's own settings say."""
    assert generate._generation_settings(parse("x", *BASE, *words)) == expected


def test_generation_gets_the_tokenizer(tokenizer_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for it where the model's settings have stop strings."""
    seen: dict[str, Any] = {}

    class Model(contextlib.nullcontext[None]):
        def generate(self, input_ids: torch.Tensor, **settings: Any) -> None:
            seen.update(settings)

    (tokenizer_files / "config.json").write_text("{}")
    monkeypatch.setattr("petalsd.client.model.RemoteCausalLM.from_pretrained", lambda *_, **__: Model())
    monkeypatch.setattr(generate, "configure_logging", lambda *_: None)
    peer = "/ip4/1.2.3.4/tcp/1/p2p/12D3KooWM6STGwUcjCfYU3aPqW4LbDGheDM8oi95bAxwj2rY1A6M"
    generate.run(parse("w1 w2", "--model", str(tokenizer_files), "--peers", peer))
    assert seen["tokenizer"].decode([1]) == "w1"


def test_the_meter_counts_tokens_and_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt is not counted; the rate is over the time since it."""
    seen: list[object] = []

    class Inner:
        def put(self, value: torch.Tensor) -> None:
            seen.append(value.tolist())

        def end(self) -> None:
            seen.append("end")

    clock = iter([10.0, 10.5, 11.0, 12.0])
    monkeypatch.setattr("petalsd.cli.generate.time.perf_counter", lambda: next(clock))
    meter = generate.MeteredStreamer(Inner())
    assert meter.summary() == "no tokens"
    for value in ([1, 2], [3], [4], [5]):
        meter.put(torch.tensor(value))
    meter.end()
    assert seen == [[1, 2], [3], [4], [5], "end"]
    assert meter.summary() == "3 tokens in 2.0 s, 1.5 tokens/s (first after 0.50 s)"


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_tokenizer(path := tmp_path_factory.mktemp("tokenizer"))
    return path


def test_a_prompt_becomes_tokens(tokenizer_files: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_files))
    assert encode_text(tokenizer, "w7 w99").tolist() == [[7, 99]]
    assert encode_text(tokenizer, " ").shape == (1, 0)
    tokenizer.chat_template = "{% for message in messages %}w1 {{ message.content }} w2{% endfor %}"
    assert encode_chat(tokenizer, [{"role": "user", "content": "w7"}]).tolist() == [[1, 7, 2]]


@pytest.mark.parametrize(
    "template", [None, "{% if %}", "{{ messages[0].no.such }}", "{{ raise_exception('no') }}", "{{ 1 + '' }}"]
)
def test_a_chat_template_that_is_missing_or_fails(tokenizer_files: Path, template: str | None) -> None:
    """Base models have none: that is told in a sentence, with what to do."""
    tokenizer = load_tokenizer(str(tokenizer_files))
    tokenizer.chat_template = template
    with pytest.raises(WeightsError, match=r"no chat template that can be used: .*leave out --chat"):
        encode_chat(tokenizer, [{"role": "user", "content": "w7"}], hint="leave out --chat")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Magic"}}'),
        ("tokenizer_config.json", "["),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [null, "words.Words"]}}',
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read(
    tokenizer_files: Path, file: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged, or of code that the repository brings: nobody is asked whether to run it."""
    path = shutil.copytree(tokenizer_files, tmp_path / "model")
    (path / file).write_text(content)
    (path / "words.py").write_text("from transformers import PreTrainedTokenizerFast as Words")
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    with pytest.raises(WeightsError, match="has no tokenizer that can be read: "):
        load_tokenizer(str(path))
