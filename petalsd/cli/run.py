"""``petalsd run``: serve, or be there for others to join, until SIGTERM or SIGINT (drain, exit 0; a second one
stops at once). SIGHUP reloads.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import resource
import signal
from types import FrameType

import structlog

from petalsd import __version__
from petalsd.cli.exit_codes import EXIT_FAILED, EXIT_OK, exit_code_of
from petalsd.cli.options import ConfigChoice, add_config_arguments, config_choice
from petalsd.config import Config
from petalsd.errors import PetalsdError
from petalsd.imports import heavy_imports
from petalsd.log import configure_logging, error_fields
from petalsd.systemd import Notifier

log = structlog.get_logger(__name__)

_WANTED_OPEN_FILES = 65536
_STDERR_FD = 2
_ASSEMBLIES = {"server": "petalsd.daemon.assembly", "bootstrap": "petalsd.daemon.bootstrap.assembly"}
"""What builds and runs a daemon, by its role."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_before_start)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing is loaded yet that could be reloaded
    _dump_stacks_on_fatal_signals()
    notifier = Notifier.take()
    choice = config_choice(arguments)
    config = choice.load().config
    configure_logging(config.daemon.log_format, config.daemon.log_level)
    role, source = config.daemon.role, config.model.source or None
    log.info("starting", version=__version__, instance=choice.paths.instance, role=role, source=source)
    _raise_file_limit()
    try:
        _serve(choice, config, notifier)
    except PetalsdError as error:
        log.error("failed", **error_fields(error))
        return exit_code_of(error)
    except Exception:  # a bug: to the log as well, where what it held is left out
        log.exception("failed", code="bug")
        return EXIT_FAILED
    return EXIT_OK


def _serve(choice: ConfigChoice, config: Config, notifier: Notifier) -> None:
    with heavy_imports():  # late: a bad file is reported without waiting for them
        import uvloop

        assembly = importlib.import_module(_ASSEMBLIES[config.daemon.role])

    uvloop.run(assembly.serve(config, choice.paths, lambda: choice.load().config, notifier))


def _exit_before_start(number: int, frame: FrameType | None) -> None:
    """A stop that comes while libraries are being imported: nothing has been started yet.

    Not by an exception: the import of a module of C can make another one of it.
    """
    os._exit(EXIT_OK)


def _dump_stacks_on_fatal_signals() -> None:
    """A process that the watchdog ends (SIGABRT) says where each thread was, on the descriptor of standard error:
    what stands in ``sys.stderr`` by now may have none.
    """
    with contextlib.suppress(OSError):  # closed: there is nobody to tell
        os.fstat(_STDERR_FD)
        faulthandler.enable(_STDERR_FD)


def _raise_file_limit() -> None:
    """Each peer takes a few file descriptors; the usual soft limit of 1024 is too low for a busy server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
