"""``petalsd generate``: continue a prompt through a swarm, printing the text as it comes."""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING, Protocol

from petalsd.cli.exit_codes import EXIT_OK
from petalsd.cli.remote_model import (
    add_log_level,
    add_model_arguments,
    check_model,
    check_peers,
    join_swarm,
)
from petalsd.imports import heavy_imports
from petalsd.log import configure_logging

if TYPE_CHECKING:
    import torch

_MAX_TOKENS = 1 << 31  # far above any session


def add_arguments(parser: argparse.ArgumentParser, *, asks_daemon: bool = False) -> None:
    """``asks_daemon``: model and peers may be left out, since a running daemon tells them."""
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads it from standard input"
    )
    add_model_arguments(parser, is_required=not asks_daemon)
    parser.add_argument(
        "--max-new-tokens", type=_positive_int, default=128, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature", type=_not_negative, default=0.0, metavar="T", help="0 (default): the likeliest token"
    )
    parser.add_argument("--top-p", type=_share, default=1.0, metavar="P", help="default: %(default)s")
    parser.add_argument("--seed", type=_seed, metavar="N", help="makes sampling repeatable")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add_log_level(parser, "warning")
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    """Print the continuation to standard output and what it took to standard error."""
    prompt = _take_prompt(arguments)
    check_peers(arguments)
    with heavy_imports():  # late: bad usage is told without waiting for them
        import torch
        from transformers import TextStreamer

        from petalsd.client.tokenizer import encode_chat, encode_text, load_tokenizer

    configure_logging("auto", arguments.log_level)
    check_model(arguments)
    tokenizer = load_tokenizer(arguments.model)
    if arguments.chat:
        message = {"role": "user", "content": prompt}
        input_ids = encode_chat(tokenizer, [message], hint="leave out --chat")
    else:
        input_ids = encode_text(tokenizer, prompt)
    if input_ids.shape[1] == 0:
        arguments.usage_error("PROMPT has no token")
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    model = join_swarm(arguments)
    streamer = MeteredStreamer(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    with model:
        # Stop strings that the model's settings have are told by the tokenizer.
        model.generate(input_ids, streamer=streamer, tokenizer=tokenizer, **_generation_settings(arguments))
    print(streamer.summary(), file=sys.stderr)
    return EXIT_OK


class Streamer(Protocol):
    """What ``generate`` tells its streamer: the prompt first, then each new token."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class MeteredStreamer:
    """Passes everything on and takes the time. ``put`` is called with the prompt, then once per token."""

    def __init__(self, inner: Streamer) -> None:
        self._inner = inner
        self._times_s: list[float] = []

    @property
    def num_tokens(self) -> int:
        return max(len(self._times_s) - 1, 0)

    def put(self, value: torch.Tensor) -> None:
        self._times_s.append(time.perf_counter())
        self._inner.put(value)

    def end(self) -> None:
        self._inner.end()

    def summary(self) -> str:
        """``64 tokens in 3.2 s, 20.0 tokens/s (first after 0.4 s)``."""
        if self.num_tokens == 0:
            return "no tokens"
        total_s = self._times_s[-1] - self._times_s[0]
        first_s = self._times_s[1] - self._times_s[0]
        rate = self.num_tokens / max(total_s, 1e-9)
        return (
            f"{self.num_tokens} tokens in {total_s:.1f} s, {rate:.1f} tokens/s (first after {first_s:.2f} s)"
        )


def _take_prompt(arguments: argparse.Namespace) -> str:
    """The prompt's text. A prompt right behind the peers was taken for one of them: no address looks like it."""
    prompt: str | None = arguments.prompt
    if prompt is None and len(arguments.peers) > 1 and not arguments.peers[-1].startswith("/"):
        prompt = arguments.peers.pop()
    if prompt == "-":
        prompt = _read_standard_input(arguments)
    if not prompt:
        arguments.usage_error("PROMPT is missing")
        raise AssertionError("argparse exits")
    return prompt


def _read_standard_input(arguments: argparse.Namespace) -> str:
    """UTF-8, whatever the locale says; empty where it is closed."""
    try:
        return "" if sys.stdin is None else sys.stdin.buffer.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        arguments.usage_error(f"standard input cannot be read: {error}")
        raise AssertionError("argparse exits") from error


def _generation_settings(arguments: argparse.Namespace) -> dict[str, object]:
    settings: dict[str, object] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    settings["num_beams"] = 1  # beams are not known before the end
    if arguments.temperature > 0:
        settings |= {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    return settings


def _positive_int(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, 1 or more")
    return int(text)


def _seed(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 1 << 64
    if not -(1 << 63) <= number < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 64 bits")
    return number


def _not_negative(text: str) -> float:
    number = _number(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in (0, 1]")
    return number


def _number(text: str) -> float:
    """NaN for what is none, or not finite."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan
