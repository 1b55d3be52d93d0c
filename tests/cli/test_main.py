"""The ``petalsd`` command: verbs, exit codes, and that light verbs stay light."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from petalsd.cli import main as cli
from petalsd.cli import show
from petalsd.cli.exit_codes import EXIT_BAD_CONFIG, EXIT_BROKEN_PIPE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from petalsd.cli.output import OutputFailed
from tests.tiers import nightly_except


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text('[model]\nsource = "owner/model"\n[blocks]\nspan = "0:4"\n')
    return file


def test_show_prints_values_and_origins(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """show lists each key with its effective value and where that came from."""
    assert cli.main(["show", "-c", str(config_file), "--set", "engine.threads=2"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith('span = "0:4"') and line.endswith(f"# {config_file}") for line in lines)
    assert any(line.startswith("threads = 2") and line.endswith("# --set") for line in lines)
    assert any(line.startswith("page_tokens = 32") and line.endswith("# default") for line in lines)


def test_what_show_prints_is_a_file_with_the_same_effect(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output of show can be saved and used as a configuration, of a bootstrap node too."""
    config_file.write_text('[daemon]\nrole = "bootstrap"\n')
    assert "model.source" not in shown_again(config_file, tmp_path, capsys)
    config_file.write_text('[model]\nsource = "owner/model"\n[blocks]\nspan = "0:4"\n')
    before = shown_again(config_file, tmp_path, capsys)
    assert before["blocks.span"] == {"value": "0:4", "origin": str(config_file)}


def shown_again(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, dict[str, object]]:
    """What show says of ``config_file`` as JSON; the same as it says of its own output as a file."""
    cli.main(["show", "-c", str(config_file), "--json"])
    before = json.loads(capsys.readouterr().out)
    cli.main(["show", "-c", str(config_file)])
    saved = tmp_path / "saved.toml"
    saved.write_text(capsys.readouterr().out)
    cli.main(["show", "-c", str(saved), "--json"])
    after = json.loads(capsys.readouterr().out)
    assert {key: item["value"] for key, item in after.items()} == {
        key: item["value"] for key, item in before.items()
    }
    return dict(before)


@pytest.mark.parametrize("verb", ["run", "check", "show"])
def test_a_bad_configuration_exits_78(
    verb: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 78 tells systemd that a restart cannot help; the text names the key."""
    assert cli.main([verb, "-c", str(config_file), "--set", "blocks.cuont=3"]) == EXIT_BAD_CONFIG
    assert "did you mean blocks.count?" in capsys.readouterr().err


def test_an_instance_may_do_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container sets everything by the environment; without it, the missing file is named."""
    monkeypatch.setenv("CONFIGURATION_DIRECTORY", str(tmp_path))
    assert cli.main(["show", "--instance", "x"]) == EXIT_BAD_CONFIG
    assert f"there is no {tmp_path}/x.toml" in capsys.readouterr().err
    monkeypatch.setenv("PETALSD_MODEL__SOURCE", "owner/model")
    assert cli.main(["show", "--instance", "x"]) == EXIT_OK


@pytest.mark.parametrize("verb", ["run", "check", "show"])
def test_a_file_whose_name_cannot_name_an_instance_is_told_so(
    verb: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody has written a word of an instance: the rule is said of the file, with a name that would do."""
    file = config_file.rename(config_file.with_name("my config (2).toml"))
    assert cli.main([verb, "-c", str(file)]) == EXIT_BAD_CONFIG
    message, hint = capsys.readouterr().err.splitlines()
    assert message.startswith(f"petalsd: {file}: the instance is called as the file, 'my config (2)': ")
    assert "mv " in hint and hint.endswith(f"{config_file.parent}/my-config-2.toml")


@pytest.mark.parametrize("file", ["", ".", "/", ".."])
def test_a_configuration_that_is_no_file_is_told_so(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """petalsd check -c "$CONFIG" where the variable is not set; with a traceback it was started again for ever."""
    assert cli.main(["check", "-c", file]) == EXIT_BAD_CONFIG
    assert "petalsd: " in capsys.readouterr().err


def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing or doubled choice of configuration is a usage error."""
    for words in (["show"], ["show", "-c", "x", "-i", "y"], ["fly"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2
    assert "usage: petalsd" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["show", "-i", "x"]])
def test_light_commands_never_import_torch(words: list[str]) -> None:
    """Help, version and show answer without torch, hivemind or asyncio servers."""
    program = (
        "import sys\nfrom petalsd.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'hivemind', 'transformers', 'uvloop'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environ = {"PETALSD_MODEL__SOURCE": "owner/model", "HOME": "/nonexistent", "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", program], env=environ, check=True, timeout=60, capture_output=True)


@pytest.mark.parametrize(
    "words", nightly_except([["show"], ["show", "--json"], ["check"]], ["show", "--json"])
)
def test_a_reader_that_leaves_ends_the_command(words: list[str], tmp_path: Path) -> None:
    """petalsd show | head: no traceback, and the status that a shell gives for SIGPIPE."""
    program = f"import sys\nfrom petalsd.cli.main import main\nsys.exit(main({[*words, '-i', 'x']!r}))"
    environ = {"PETALSD_MODEL__SOURCE": str(tmp_path / "none"), "HOME": str(tmp_path), "PATH": "/usr/bin"}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == EXIT_BROKEN_PIPE


@pytest.mark.parametrize(
    "words", nightly_except([["show"], ["show", "--json"], ["check"]], ["show", "--json"])
)
def test_an_output_that_cannot_be_written_is_told(words: list[str], tmp_path: Path) -> None:
    """petalsd show > file, on a full disk."""
    program = f"import sys\nfrom petalsd.cli.main import main\nsys.exit(main({[*words, '-i', 'x']!r}))"
    environ = {"PETALSD_MODEL__SOURCE": str(tmp_path / "none"), "HOME": str(tmp_path), "PATH": "/usr/bin"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environ, stdout=full, stderr=subprocess.PIPE
        )
    assert done.stderr == b"petalsd: the output cannot be written: No space left on device\n"
    assert done.returncode == EXIT_FAILED


@pytest.mark.parametrize("command", ["petalsd", "petalsd.cli.petalsctl.main"])
@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["generate", "--help"]])
def test_help_is_output_as_any_other(command: str, words: list[str]) -> None:
    """petalsctl --help | head, or > file: argparse keeps a failure to itself, and then Python complained."""
    program, environ = [sys.executable, "-m", command, *words], {"PATH": "/usr/bin"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program, env=environ, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (EXIT_BROKEN_PIPE, b"")
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, env=environ, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert b"the output cannot be written: No space left on device" in done.stderr
    assert done.returncode == (EXIT_FAILED if command == "petalsd" else 4)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_show_is_toml_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    """A file is in UTF-8, whatever the terminal speaks; what it does not have must not end the command."""
    name = "café \N{PINE DECORATION} \x7f"
    words = ["-m", "petalsd", "show", "-i", "x", "--set", f"swarm.public_name={name}"]
    environ = {"PETALSD_MODEL__SOURCE": "owner/model", "HOME": str(tmp_path), "PATH": "/usr/bin"}
    environ |= {"PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}
    done = subprocess.run([sys.executable, *words], env=environ, capture_output=True, timeout=60, check=True)
    assert tomllib.loads(done.stdout.decode())["swarm"]["public_name"] == name


@pytest.mark.parametrize(
    ("words", "redirection", "expected"),
    [("show -i x", ">&-", EXIT_OK), ("show -i ../x", "2>&-", EXIT_BAD_CONFIG),
     ("show -i ../x", "2>/dev/full", EXIT_BAD_CONFIG), ("check -i x", ">&- 2>/dev/full", EXIT_BAD_CONFIG)],
)  # fmt: skip
def test_closed_streams_do_not_change_the_exit_status(
    words: str, redirection: str, expected: int, tmp_path: Path
) -> None:
    """78 keeps systemd from starting it again and again, whatever becomes of the sentence."""
    environ = {"PETALSD_MODEL__SOURCE": str(tmp_path / "none"), "HOME": str(tmp_path), "PATH": "/usr/bin"}
    command = f"exec {shlex.quote(sys.executable)} -m petalsd {words} {redirection}"
    done = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, timeout=60)
    assert done.returncode == expected
    assert b"Traceback" not in done.stderr


def test_another_disk_that_fails_is_not_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Errors of reading and writing name no file; what failed stands in the traceback alone."""

    def fail(arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(show, "run", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        cli.main(["show", "-i", "x"])
    assert not isinstance(caught.value, OutputFailed)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("words", [["-c"], ["-i", "tiny"]])
def test_a_file_in_a_closed_directory_is_no_traceback(
    words: list[str], config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may look anywhere, so what others meet is put in its place."""
    monkeypatch.setenv("CONFIGURATION_DIRECTORY", str(config_file.parent))

    def deny(self: Path, *arguments: object, **options: object) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "stat", deny)
    monkeypatch.setattr(Path, "read_text", deny)
    named = words if len(words) == 2 else [*words, str(config_file)]
    assert cli.main(["show", *named]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith(f"petalsd: {config_file}: Permission denied\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_libraries_are_imported_exits_0(
    number: signal.Signals, config_file: Path, tmp_path: Path
) -> None:
    """Also where a module makes an error of its own of whatever ends its import, as some of C do."""
    (tmp_path / "uvloop.py").write_text(
        "import os\ntry:\n    os.kill(os.getpid(), NUMBER)\nexcept BaseException:\n"
        "    raise ImportError('it failed') from None\n".replace("NUMBER", str(int(number)))
    )
    started = subprocess.run(
        [sys.executable, "-m", "petalsd", "run", "-c", str(config_file)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (started.returncode, "failed" in started.stderr) == (EXIT_OK, False), started.stderr


def test_ctrl_c_while_a_verb_is_imported_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["check"]) == EXIT_INTERRUPTED
