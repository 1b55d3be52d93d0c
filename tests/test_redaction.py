"""No prompt, token, hidden state or local variable in any log line, in any form, whoever logs it."""

from __future__ import annotations

import ast
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch

from petalsd import journal
from petalsd.engine.step import Step
from petalsd.errors import EngineError
from petalsd.log import configure_logging, error_fields
from petalsd.redaction import MAX_ITEMS, MAX_TEXT_CHARS, exception_records, exception_text, plain, scrubbed
from petalsd.swarm.faults import wire_text
from petalsd.types import BlockSpan
from tests.engine.rig import TinyModel, opened, serving, with_hook
from tests.journald import Receiver
from tests.log_calls import log_calls

SECRET = 273.0625
SHOWN = "273.06"
"""Every value of a secret tensor, and what would be seen of it."""


def secret_states() -> torch.Tensor:
    return torch.full((1, 3, 64), SECRET)


@pytest.fixture(params=["json", "console", "journal"])
def logged(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """Everything is logged in one of the forms; call it for all that was."""
    receiver, out = Receiver(tmp_path / "socket"), io.StringIO()
    receiver.start()
    monkeypatch.setattr(journal, "SOCKET", tmp_path / "socket")
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    configure_logging(request.param, "debug", out)
    yield lambda: out.getvalue() + "\n".join(str(fields) for fields in receiver.drain())
    root.handlers[0].close()
    root.handlers = handlers
    root.setLevel(level)
    receiver.stop()


def fail_with_states(hidden: torch.Tensor) -> None:
    kept = hidden * 1.0
    text = f"bad states: {kept}"
    try:
        raise ValueError(hidden, kept.numpy())
    except ValueError as error:
        error.add_note(f"as a list: {kept.flatten().tolist()}")
        raise RuntimeError(text, hidden) from error


async def test_a_failing_session_shows_none_of_its_states(tmp_path: Path, logged: Callable[[], str]) -> None:
    """A block raises with tensors in its arguments, its text, its cause, a note and its locals."""
    model = TinyModel(tmp_path / "model")
    async with (
        serving(model, blocks=with_hook(model, 0, fail_with_states)) as engine,
        opened(engine, peer="a-peer") as session,
    ):
        with pytest.raises(EngineError):
            await session.step(Step(secret_states(), 0))
    text = logged()
    assert "session_failed" in text and "a-peer" in text
    assert "fail_with_states" in text and "bad states" in text  # it still says what went wrong, and where
    assert SHOWN not in text


def test_a_failing_call_shows_none_of_what_it_held(logged: Callable[[], str]) -> None:
    """The peer gets an id, the log the error under it, and neither gets contents."""
    try:
        fail_with_states(secret_states())
    except RuntimeError as error:
        answer = wire_text(error, "rpc_inference", "a-peer")
    text = logged()
    assert answer.rpartition(" ")[2] in text
    assert "call_failed" in text and "RuntimeError" in text and "ValueError" in text
    assert SHOWN not in text + answer


@pytest.mark.parametrize(
    "value",
    [secret_states(), [secret_states()], {"states": secret_states().numpy()}, np.full(3, SECRET),
     b"273.06", RuntimeError(secret_states()), bytearray(b"273.06"), object],
    ids=["tensor", "list", "map", "array", "bytes", "error", "bytearray", "class"],
)  # fmt: skip
def test_fields_are_plain_values(value: object, logged: Callable[[], str]) -> None:
    """A call that passes something else shows its type."""
    structlog.get_logger("petalsd.x").info("careless", value=value)
    text = logged()
    assert "careless" in text and "<" in text
    assert SHOWN not in text


def test_lines_of_libraries_are_scrubbed(logged: Callable[[], str]) -> None:
    """Their texts, their arguments and their tracebacks."""
    library = logging.getLogger("some_library.part")
    library.warning("got %s from %s", secret_states(), "a-peer")
    try:
        fail_with_states(secret_states())
    except RuntimeError:
        library.exception("handler failed")
    text = logged()
    assert "a-peer" in text and "handler failed" in text
    assert SHOWN not in text


def test_expected_errors_are_scrubbed(logged: Callable[[], str]) -> None:
    """Also those that are logged as fields, without a traceback."""
    error = EngineError(f"no: {secret_states()} and {[7] * 20}")
    structlog.get_logger("petalsd.x").error("failed", **error_fields(error))
    text = logged()
    assert "no: <tensor> and" in text
    assert SHOWN not in text and "7, 7" not in text


def test_what_helps_is_kept() -> None:
    """Shapes, spans, addresses, paths, versions and times are no contents."""
    for text in (
        "hidden states = (1, 3, 64): must be floats of shape [batch, tokens, 64]",
        "blocks 0:4, 10:12 on /ip4/10.0.0.1/tcp/4001",
        "2025-01-02T03:04:05.678901Z took 1.25 s, 3 of 4 files (12,345,678 bytes), torch 2.11.0",
        'File "/usr/lib/petalsd/engine.py", line 12, in run',
        "Size([1, 2, 3, 4])",
    ):
        assert scrubbed(text) == text
    assert plain({"path": Path("/x"), "span": (1, 2), "none": None, "deep": {"a": [True]}}) == {
        "path": "/x", "span": [1, 2], "none": None, "deep": {"a": [True]}
    }  # fmt: skip
    assert plain(BlockSpan(0, 1)) == "<BlockSpan>"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"x {torch.ones(2, 2)} y", "x <tensor> y"),
        (f"x {torch.ones(2, 2, requires_grad=True) * 2} y", "x <tensor> y"),
        (f"{torch.nn.Parameter(torch.ones(300))}", "Parameter containing:\n<tensor>"),
        (repr(torch.ones(2000))[:30], "<tensor>"),
        (f"ids {list(range(100))} end", "ids [<numbers>] end"),
        (f"{np.arange(50.0)}", "[ <numbers>]"),
        (f"{[float('nan'), float('inf')] * 9}", "[<numbers>]"),
        (repr(b"\x00\xff" * 9), "b'<bytes>'"),
        (r'buffer: "\000\001\002\003\004\005\006\007"', 'buffer: "<bytes>"'),
    ],
)
def test_what_looks_like_contents_goes(text: str, left: str) -> None:
    """As torch, numpy, Python and protobuf print it, whole or cut off."""
    assert scrubbed(text) == left


def test_texts_and_lists_are_bounded() -> None:
    """A line stays one that can be read, and scrubbing one stays cheap."""
    assert scrubbed("é" * (MAX_TEXT_CHARS + 5)) == "é" * MAX_TEXT_CHARS + "… (5 more characters)"
    assert plain(["x"] * (MAX_ITEMS + 2)) == ["x"] * MAX_ITEMS + ["and 2 more"]
    assert len(plain({str(n): n for n in range(1000)})) == MAX_ITEMS
    nested: list[object] = []
    nested.append(nested)
    assert json.dumps(plain(nested)) == '[[[["<list>"]]]]'


@pytest.mark.timeout(10)
@pytest.mark.parametrize("piece", ["1", "1 ", "tensor(", "((", "\\x00", "1.1e", "nan,", "array(("])
def test_no_text_takes_long(piece: str) -> None:
    """Peers choose some of what is scrubbed."""
    for _ in range(20):
        scrubbed(piece * MAX_TEXT_CHARS)


def test_exceptions_of_every_shape_are_told() -> None:
    """Groups, causes, circles and broken texts."""

    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    first, second = ValueError("one"), KeyError("two")
    first.__cause__, second.__context__ = second, first
    group = ExceptionGroup("both", [first, Broken()])
    told = [(record["exc_type"], record["exc_value"]) for record in exception_records(group)]
    assert told == [
        ("ExceptionGroup", "both (2 sub-exceptions)"), ("ValueError", "one"), ("Broken", "<no text>"),
        ("KeyError", "'two'"),
    ]  # fmt: skip
    assert exception_text(group).splitlines()[-1] == "ExceptionGroup: both (2 sub-exceptions)"
    try:
        raise OSError("hidden") from None
    except OSError as error:
        error.__context__ = first
        assert [record["exc_type"] for record in exception_records(error)] == ["OSError"]


CONTENTS = {
    "activation", "activations", "body", "buffer", "embeddings", "grad", "grads", "grad_output", "grad_outputs",
    "hidden", "hidden_states", "ids", "input_ids", "inputs", "logits", "output", "outputs", "payload", "prompt",
    "prompts", "raw", "request", "states", "tensor", "tensors", "text", "token", "token_ids", "tokens", "weights",
}  # fmt: skip
_MEASURES = {"shape", "dtype", "device", "nbytes", "peer", "span", "method", "path", "prefix"}


def names_of_contents(value: ast.expr) -> set[str]:
    """Names in an expression that stand for contents, unless only their number or a fact about them is taken."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("len", "type"):
        return set()
    if isinstance(value, ast.Attribute) and value.attr in _MEASURES:
        return set()
    own = (
        {value.id}
        if isinstance(value, ast.Name)
        else {value.attr}
        if isinstance(value, ast.Attribute)
        else set()
    )
    inner = [node for node in ast.iter_child_nodes(value) if isinstance(node, ast.expr)]
    return (own & CONTENTS).union(*map(names_of_contents, inner))


def test_no_call_passes_contents() -> None:
    """Events are literal names with fields; no field, and nothing that it is made of, is named like contents."""
    calls = list(log_calls())
    assert len(calls) > 50
    for call in calls:
        if call.place.startswith("log_limits.py"):
            continue
        assert call.event is not None and call.event.replace("_", "").isalnum(), (
            f"{call.place}: no literal event"
        )
        assert call.extra == 0, f"{call.place}: arguments belong into fields"
        for keyword in call.keywords:
            assert keyword.arg not in {*CONTENTS, "exception"}, f"{call.place}: {keyword.arg}"
            assert not names_of_contents(keyword.value), f"{call.place}: {ast.unparse(keyword.value)}"


@pytest.mark.parametrize(
    ("expression", "names"),
    [("len(tensors)", set()), ("request.peer", set()), ("str(hidden)", {"hidden"}), ("step.hidden", {"hidden"}),
     ("job.request.span", set()), ("{'a': [tensors[0]]}", {"tensors"}), ("hidden.shape", set())],
)  # fmt: skip
def test_the_search_finds_contents(expression: str, names: set[str]) -> None:
    """The test above can fail."""
    assert names_of_contents(ast.parse(expression, mode="eval").body) == names
