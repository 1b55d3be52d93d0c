"""Where values come from: command line > environment > file > default, and from which one each came.

All problems are collected and reported at once, each with the key, the value, its origin and what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from petalsd.config import BOOTSTRAP_KEYS, Config, Section
from petalsd.errors import ConfigError

ENVIRONMENT_PREFIX = "PETALSD_"
DEFAULT_ORIGIN = "default"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration; ``origins`` says for each ``section.key`` where its value came from."""

    config: Config
    origins: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Values of one source: ``section.key`` to (value, origin)."""

    values: Mapping[str, tuple[object, str]]
    problems: Sequence[str] = ()


def load_config(file: Path | None, environ: Mapping[str, str], overrides: Sequence[str]) -> LoadedConfig:
    """Merge the layers; ``overrides`` are ``section.key=value``. ConfigError lists all that is wrong."""
    layers = [_file_layer(file), _environment_layer(environ), _override_layer(overrides)]
    merged = {key: pair for layer in layers for key, pair in layer.values.items()}
    problems = [problem for layer in layers for problem in layer.problems]
    origins = {key: merged[key][1] if key in merged else DEFAULT_ORIGIN for key in known_keys()}
    config: Config | None = None
    try:
        config = Config.model_validate(_nested(merged))
    except ValidationError as error:
        problems += _describe(error, origins)
    if problems or config is None:
        raise ConfigError("\n  ".join(["the configuration cannot be used:", *problems]))
    return LoadedConfig(config, origins)


def known_keys() -> dict[str, FieldInfo]:
    """Every ``section.key`` in the order of the documentation."""
    return {
        f"{section}.{key}": field
        for section, fields in _sections().items()
        for key, field in fields.model_fields.items()
    }


def obeyed_keys(config: Config) -> list[str]:
    """Those of ``known_keys`` that mean something to a daemon of this role."""
    is_server = config.daemon.role == "server"
    return [key for key in known_keys() if is_server or BOOTSTRAP_KEYS.fullmatch(key)]


def value_of(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def changed_keys(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """(keys whose change a reload applies, keys whose change needs a restart)."""
    if old.daemon.role != new.daemon.role:  # what the other keys say is meant for another kind of daemon
        return [], ["daemon.role"]
    live: list[str] = []
    restart: list[str] = []
    for key, field in known_keys().items():
        if value_of(old, key) != value_of(new, key):
            extra = cast(dict[str, Any], field.json_schema_extra)
            (live if extra["live"] else restart).append(key)
    return live, restart


def with_live_keys(old: Config, new: Config) -> Config:
    """``old`` with the values of ``new`` for the keys that a reload applies."""
    live, _ = changed_keys(old, new)
    updates: dict[str, dict[str, object]] = {}
    for key in live:
        section, _, name = key.partition(".")
        updates.setdefault(section, {})[name] = value_of(new, key)
    sections = {
        section: getattr(old, section).model_copy(update=values) for section, values in updates.items()
    }
    return old.model_copy(update=sections)


def _sections() -> dict[str, type[Section]]:
    return {name: cast(type[Section], field.annotation) for name, field in Config.model_fields.items()}


def _file_layer(file: Path | None) -> _Layer:
    if file is None:
        return _Layer({})
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", hint="check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error}") from error
    except ValueError as error:  # also for a number of more digits than Python reads
        raise ConfigError(f"{file}: not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: nested too deeply to be read") from error
    values: dict[str, tuple[object, str]] = {}
    problems: list[str] = []
    for section, table in document.items():
        if not isinstance(table, dict):
            is_section = section in _sections()
            wrong = f"is a section: write [{section}]" if is_section else "stands outside a section"
            problems.append(f"{file}: {section} {wrong}{'' if is_section else _hint_for_key(section)}")
            continue
        for key, value in table.items():
            _put(values, problems, (f"{section}.{key}", value, str(file)))
        if not table and section not in _sections():
            problems.append(f"{file}: unknown section [{section}]{_hint_for_section(section)}")
    return _Layer(values, problems)


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    values: dict[str, tuple[object, str]] = {}
    problems: list[str] = []
    for name, text in environ.items():
        section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if name.startswith(ENVIRONMENT_PREFIX) and separator:
            _put_text(values, problems, (f"{section}.{key}", text, f"environment {name}"))
    return _Layer(values, problems)


def _override_layer(overrides: Iterable[str]) -> _Layer:
    values: dict[str, tuple[object, str]] = {}
    problems: list[str] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            problems.append(f"--set {override}: write section.key=value")
        else:
            _put_text(values, problems, (key.strip(), text, "--set"))
    return _Layer(values, problems)


def _put(
    values: dict[str, tuple[object, str]], problems: list[str], entry: tuple[str, object, str]
) -> FieldInfo | None:
    key, value, origin = entry
    field = known_keys().get(key)
    if field is None:
        problems.append(f"{origin}: unknown key {key}{_hint_for_key(key)}")
    else:
        values[key] = (value, origin)
    return field


def _put_text(
    values: dict[str, tuple[object, str]], problems: list[str], entry: tuple[str, str, str]
) -> None:
    key, text, origin = entry
    field = _put(values, problems, entry)
    if field is None:
        return
    if not _is_utf8(text):  # such a name would break the first message that carries it
        problems.append(f"{origin}: {key} = {_shown(text)}: is not UTF-8")
    else:
        values[key] = (_from_text(field, text), origin)


def _is_utf8(text: str) -> bool:
    """Python has lone surrogates for bytes of the environment and of arguments that are something else."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_text(field: FieldInfo, text: str) -> object:
    """The first reading of ``text`` that the key accepts: as it stands, as a TOML value, as a comma list."""
    adapter: TypeAdapter[object] = TypeAdapter(
        field.rebuild_annotation(), config={"strict": True, "arbitrary_types_allowed": True}
    )
    readings: list[object] = [text]
    with contextlib.suppress(ValueError, RecursionError):  # as of a file
        readings.append(tomllib.loads(f"value = {text}")["value"])
    readings.append([part.strip() for part in text.split(",") if part.strip()])
    for reading in readings:
        try:
            adapter.validate_python(reading)
        except ValidationError:
            continue
        return reading
    return readings[-2]  # the TOML value if it is one, else the text: what the error should show


def _nested(merged: Mapping[str, tuple[object, str]]) -> dict[str, dict[str, object]]:
    tree: dict[str, dict[str, object]] = {"model": {}}
    for key, (value, _) in merged.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def _describe(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """One line per key; the alternatives of a union are joined by "or"."""
    rules: dict[str, list[str]] = {}
    values: dict[str, object] = {}
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"][:2])
        rule = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "missing":
            rule = f"is required: {known_keys()[key].description}"
        rules.setdefault(key, []).append(rule.replace("Input should be", "should be"))
        values[key] = detail["input"]
    lines = []
    for key, broken in rules.items():
        text = " or ".join(broken)
        if key in origins and not text.startswith("is required"):
            text = f"{origins[key]}: {key} = {_shown(values[key])}: {text}"
        elif key:
            text = f"{key} {text}"
        lines.append(text)
    return lines


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _hint_for_key(key: str) -> str:
    """A near miss: a misspelt key, or a good key in the wrong section."""
    name = key.rpartition(".")[2]
    elsewhere = [known for known in known_keys() if known.endswith(f".{name}")]
    close = elsewhere or difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _hint_for_section(section: str) -> str:
    close = difflib.get_close_matches(section, _sections(), n=1, cutoff=0.6)
    return f"; did you mean [{close[0]}]?" if close else ""
