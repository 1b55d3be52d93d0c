"""Real shells complete what the real parsers take: verbs, options, their values, and names of instances."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.packaging.commands import PACKAGING, all_options, choices_of, verbs

COMPLETIONS = PACKAGING / "completions"
FILES = {"bash": "petalsd", "zsh": "_petalsd", "fish": "petalsd.fish"}

Complete = Callable[..., list[set[str]]]


@pytest.fixture(params=sorted(FILES))
def complete(request: pytest.FixtureRequest, tmp_path: Path) -> Complete:
    """What the shell offers at the end of each line, on a machine whose instances are those below ``tmp_path``."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    text = (COMPLETIONS / shell / FILES[shell]).read_text()
    for directory in ("/etc/petalsd", "/run/petalsd"):
        assert directory in text
        text = text.replace(directory, f"{tmp_path}{directory}")
    functions = tmp_path / "functions"
    functions.mkdir()
    (functions / FILES[shell]).write_text(text)
    return lambda *lines: _SHELLS[shell](functions, lines)


def run(argv: list[str]) -> list[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def complete_in_bash(functions: Path, lines: Sequence[str]) -> list[set[str]]:
    """As readline would call it, found by the command's registration."""
    return [_complete_line_in_bash(functions, line) for line in lines]


def _complete_line_in_bash(functions: Path, line: str) -> set[str]:
    words = line.split(" ")
    script = (
        f"source {functions}/petalsd; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
        f'[[ $(complete -p {words[0]}) =~ -F\\ ([a-z_]+) ]] && "${{BASH_REMATCH[1]}}" '
        f"{words[0]} {shlex.quote(words[-1])} {shlex.quote(words[-2])}; "
        'for word in "${COMPREPLY[@]}"; do echo "$word"; done'
    )
    return set(run(["bash", "--norc", "-c", script]))


def complete_in_zsh(functions: Path, lines: Sequence[str]) -> list[set[str]]:
    """One shell for all lines: it takes half a second to come up."""
    script = Path(__file__).with_name("complete.zsh")
    offered: list[set[str]] = []
    for text in run(["zsh", "-f", str(script), str(functions), *lines]):
        if text == "LINE":
            offered.append(set())
        elif text:
            offered[-1].add(text.removeprefix("OFFER:"))
    return offered


def complete_in_fish(functions: Path, lines: Sequence[str]) -> list[set[str]]:
    """As the shell's own pager gets it."""
    script = f"source {functions}/petalsd.fish; complete --do-complete "
    answers = [run(["fish", "--no-config", "--command", script + shlex.quote(line)]) for line in lines]
    return [{offer.partition("\t")[0] for offer in answer} for answer in answers]


_SHELLS = {"bash": complete_in_bash, "zsh": complete_in_zsh, "fish": complete_in_fish}


@pytest.mark.parametrize("command", verbs())
def test_verbs_are_complete(complete: Complete, command: str) -> None:
    """A new verb must be told to the shells."""
    assert complete(f"{command} ") == [set(verbs()[command])]


def test_an_option_before_it_does_not_hide_the_verb(complete: Complete) -> None:
    """Not even one whose value is the name of a verb."""
    assert complete("petalsctl -i status --json dr") == [{"drain"}]


@pytest.mark.parametrize("command", verbs())
def test_options_are_complete(complete: Complete, command: str) -> None:
    """Each verb offers its own options and the common ones, and no other verb's."""
    wanted = {verb: options for (owner, verb), options in all_options().items() if owner == command}
    before = [f"{command} {verb} " if verb else f"{command} " for verb in wanted]
    short = complete(*(f"{line}-" for line in before))
    long = complete(*(f"{line}--" for line in before))
    assert {verb: short[index] | long[index] for index, verb in enumerate(wanted)} == wanted


def test_values_are_complete(complete: Complete) -> None:
    """Options with few values offer those, others nothing."""
    options = ("--dtype", "--log-level")
    choices = [choices_of("petalsd", "generate", option) for option in options]
    assert complete(*(f"petalsd generate {option} " for option in options)) == choices
    assert complete("petalsctl generate --peers ", "petalsctl drain --deadline ") == [{"public"}, set()]


def test_instances_are_complete(complete: Complete, tmp_path: Path) -> None:
    """Configured and running instances, each once; files of other kinds are none."""
    (tmp_path / "etc/petalsd").mkdir(parents=True)
    for name in ("a.toml", "b.v2.toml", "b.toml.disabled"):
        (tmp_path / "etc/petalsd" / name).touch()
    for name in ("a", "running"):
        (tmp_path / "run/petalsd" / name).mkdir(parents=True)
    assert complete("petalsctl -i ", "petalsd run --instance r") == [{"a", "b.v2", "running"}, {"running"}]


def test_values_behind_an_equals_sign(complete: Complete, tmp_path: Path) -> None:
    """bash takes --instance=NAME apart; to the others it is one word, of which fish offers the whole."""
    (tmp_path / "run/petalsd/running").mkdir(parents=True)
    is_bash = (tmp_path / "functions/petalsd").exists()
    equals = " = " if is_bash else "="
    offers = complete(
        f"petalsctl --instance{equals}r",
        f"petalsctl --instance{equals}running dr",
        f"petalsctl --socket{equals}/x drain --dead",
        f"petalsd generate --dtype{equals}bf",
    )
    assert [{offer.rpartition("=")[2] for offer in offered} for offered in offers] == [
        {"running"}, {"drain"}, {"--deadline"}, {"bfloat16"},
    ]  # fmt: skip
    if is_bash:
        assert complete("petalsctl --instance =") == [{"running"}]


def test_without_instances_nothing_is_offered(complete: Complete) -> None:
    """No directory, no noise."""
    assert complete("petalsctl drain -i ") == [set()]
