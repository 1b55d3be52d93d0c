"""The container image: what it shares with the package and the unit; how the one in PETALSD_TEST_IMAGE runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalsd.cli.exit_codes import EXIT_BAD_CONFIG
from tests.packaging.commands import PACKAGING
from tests.tiny_models import make_tiny

CONTAINERFILE = PACKAGING / "container/Containerfile"
IMAGE = os.environ.get("PETALSD_TEST_IMAGE", "")
START_S = 120


def variables() -> dict[str, str]:
    """What the image's ENV sets."""
    text = re.sub(r"\\\n", " ", CONTAINERFILE.read_text())
    (line,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    return dict(word.split("=", 1) for word in line.split())


def test_it_has_the_variables_of_the_unit() -> None:
    """Every cache is named, and nothing of a stranger's directory is imported."""
    unit = (PACKAGING / "systemd/petalsd@.service").read_text()
    lines = re.findall(r"^Environment=(.*)$", unit, re.MULTILINE)
    wanted = dict(word.replace("%C", "/var/cache").split("=", 1) for line in lines for word in line.split())
    assert wanted.items() <= variables().items()


def test_the_build_gets_what_the_package_is_made_of() -> None:
    """And not the environments beside it."""
    build = (PACKAGING / "deb/build.sh").read_text()
    (names,) = re.findall(r"^  (petalsd kernels .*) \| tar", build, re.MULTILINE)
    ignore = (PACKAGING.parent / ".dockerignore").read_text().splitlines()
    assert [line[1:] for line in ignore if line.startswith("!")] == names.split()


def engine() -> str:
    """The engine that has the image; skips unless one is named: one found by chance is of another tree."""
    if not IMAGE:
        pytest.skip("no image to test: make image && make test PETALSD_TEST_IMAGE=petalsd")
    for name in ("podman", "docker"):
        if shutil.which(name) and run(name, "image", "inspect", IMAGE, check=False).returncode == 0:
            return name
    pytest.fail(f"no container engine has the image {IMAGE}: make image")


def run(*argv: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=check)


class Container:
    """``petalsd run --instance main`` over a tiny model, as docs/container.md starts it."""

    def __init__(self, engine: str, directory: Path) -> None:
        self.engine, self.name = engine, f"petalsd-test-{os.getpid()}"
        self.directory = directory

    def start(self) -> None:
        make_tiny("llama", self.directory / "model")
        (self.directory / "main.toml").write_text(
            '[model]\nsource = "/model"\n[blocks]\nspan = "0:2"\n[swarm]\n'
            'host_maddrs = ["/ip4/127.0.0.1/tcp/31337"]\n'
        )
        for path in (self.directory / "model").iterdir():
            path.chmod(0o644)  # another user is to read it
        run(
            self.engine, "run", "-d", "--name", self.name, "--network", "host", "--stop-timeout", "90",
            "--cap-drop", "all", "--security-opt", "no-new-privileges",
            "--read-only", "--tmpfs", "/tmp",
            "-v", f"{self.directory / 'model'}:/model:ro",
            "-v", f"{self.directory / 'main.toml'}:/etc/petalsd/main.toml:ro", IMAGE,
        )  # fmt: skip

    def petalsctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run(self.engine, "exec", self.name, "petalsctl", *words, check=False)

    def log(self) -> list[dict[str, object]]:
        output = run(self.engine, "logs", self.name)
        return [json.loads(line) for line in (output.stdout + output.stderr).splitlines()]

    def until_online(self) -> None:
        """Asks again and again: engines end `logs --follow` when they like."""
        deadline = time.monotonic() + START_S
        while not (found := {"online", "failed", "stopped"} & {str(event["event"]) for event in self.log()}):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.5)
        assert found == {"online"}, self.log()

    def end(self) -> None:
        run(self.engine, "rm", "--force", "--volumes", self.name, check=False)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    container = Container(engine(), tmp_path)
    try:
        container.start()
        yield container
    finally:
        container.end()


@pytest.mark.slow
def test_it_serves_and_a_stop_drains(container: Container) -> None:
    """Without capabilities, on a file system that cannot be written."""
    container.until_online()
    assert container.petalsctl("status").stdout.startswith("● main is online")
    assert container.petalsctl("reload").returncode == 0
    run(container.engine, "stop", container.name)
    state = run(container.engine, "inspect", "--format", "{{.State.ExitCode}}", container.name)
    assert state.stdout.strip() == "0"
    assert [event["event"] for event in container.log()][-1] == "stopped"


@pytest.mark.slow
def test_what_is_wrong_is_said_by_its_exit_status() -> None:
    """As on a machine: the engine's restart policy may tell it from a failure."""
    result = run(engine(), "run", "--rm", IMAGE, "check", "--instance", "main", check=False)
    assert result.returncode == EXIT_BAD_CONFIG
    assert "model.source" in result.stderr
