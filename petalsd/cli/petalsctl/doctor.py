"""``petalsctl doctor``: looks at the machine and at one instance, and says how to mend what is wrong.

Works without the daemon. Fails (exit 4) when something would keep it from serving.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace

from petalsd.cli.petalsctl.context import Context, Document, parse
from petalsd.cli.petalsctl.exit_codes import EXIT_FAILED, EXIT_OK
from petalsd.cli.petalsctl.findings import Check, Finding, run_checks
from petalsd.cli.petalsctl.instances import Instance, all_configured
from petalsd.cli.petalsctl.problems import BadUsage, CommandError, NoAnswer
from petalsd.cli.petalsctl.text import EMPTY, Piece, line
from petalsd.cli.petalsctl.units import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(context: Context, arguments: argparse.Namespace) -> int:
    findings: list[Finding] = []
    for finding in run_checks(_checks(context)):
        findings.append(finding)
        if not context.is_json:
            context.out.show(finding.lines())
    if context.is_json:
        print(
            json.dumps({"schema_version": 1, "findings": [asdict(finding) for finding in findings]}, indent=2)
        )
    else:
        _summarize(context, findings)
    return EXIT_FAILED if any(finding.level == "fail" for finding in findings) else EXIT_OK


def _checks(context: Context) -> Iterator[tuple[str, Check]]:
    """The machine first: without it nothing of an instance can be looked at."""
    from petalsd.cli.petalsctl.machine_checks import machine_checks

    yield from machine_checks()
    try:
        instance, status = _ask(context)
    except NoAnswer as error:
        text, fix = f"{error.message}; {error.hint}", "check its name, or write its file: petalsd.toml(5)"
        yield "instance", lambda: Finding("instance", "fail", text, fix)
        return
    if instance is None or instance.name is None:
        fix = "petalsctl -i NAME doctor looks at one, its configuration and its network too"
        yield "instance", lambda: Finding("instance", "warn", "which one is meant is not known", fix)
        return
    from petalsd.cli.petalsctl.instance_checks import Patient, instance_checks

    yield from instance_checks(Patient(instance, context.system, context.environ, status))


def _ask(context: Context) -> tuple[Instance | None, Document | None]:
    """The one that is meant, running or not, and its status if it answers; None where several may be.

    NoAnswer when its name is unknown, BadUsage when it is none.
    """
    try:
        instance = context.instance
    except BadUsage:
        if context.is_named:
            raise
        return None, None  # several are running
    except NoAnswer:
        if context.is_named:
            raise
        configured = all_configured(context.environ, context.system)
        return (configured[0] if len(configured) == 1 else None), None
    try:
        status = parse(context.get("/v1/status"))
    except CommandError:
        return instance, None
    return (instance if instance.name else replace(instance, name=status["instance"])), status


def _summarize(context: Context, findings: list[Finding]) -> None:
    failed = sum(finding.level == "fail" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    if failed:
        verdict = Piece(f"{counted(failed, 'problem')} would keep petalsd from serving", "bold bad")
    elif warned:
        verdict = Piece(
            f"{counted(warned, 'thing')} to look at, nothing that keeps petalsd from serving", "bold busy"
        )
    else:
        verdict = Piece("all is well", "bold good")
    context.out.show([EMPTY, line(verdict)])
