"""One instance of the service in a lab: its configuration, its drop-ins, its life, what it tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.systemd.installation import FAULTY
from tests.systemd.journal import Entry, Journal
from tests.systemd.lab import Lab

NUM_BLOCKS = 4
_FIRST_PORT = 4000


class Instance:
    """``petalsd@NAME`` with the tiny model; ``number`` gives it a port of its own, the same in all its lives."""

    def __init__(self, lab: Lab, journal: Journal, name: str, number: int = 0) -> None:
        self.lab = lab
        self.journal = journal
        self.name = name
        self.unit = f"petalsd@{name}.service"
        self._port = _FIRST_PORT + number

    def configure(self, source: str, **sections: Mapping[str, Any]) -> None:
        """Write /etc/petalsd/NAME.toml: the tiny model on loopback, changed by ``sections``."""
        config: dict[str, dict[str, Any]] = {
            "model": {"source": source, "dtype": "float32"},
            "blocks": {"span": f"0:{NUM_BLOCKS}", "join_delay_s": 0.1},
            "swarm": {"host_maddrs": [f"/ip4/127.0.0.1/tcp/{self._port}"], "throughput": 10},
            "engine": {"device": "cpu", "kv_tokens": 4096, "threads": 1},
        }
        for section, keys in sections.items():
            config.setdefault(section, {}).update(keys)
        lines = []
        for section, keys in config.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        self.write_config("\n".join(lines) + "\n")

    def write_config(self, text: str) -> None:
        self.lab.write(f"/etc/petalsd/{self.name}.toml", text)

    def drop_in(self, *lines: str) -> None:
        """Change the unit's [Service] section for this instance."""
        text = "\n".join(["[Service]", *lines, ""])
        self.lab.write(f"/etc/systemd/system/{self.unit}.d/test.conf", text)
        self.lab.systemctl("daemon-reload")

    def run_faulty(self, watchdog_s: float, **environ: str) -> None:
        """From the next start on, the daemon is the one with built-in faults, and watched this closely."""
        variables = [f"Environment={name}={value}" for name, value in environ.items()]
        command = ("ExecStart=", f"ExecStart={FAULTY} run --instance %i")
        self.drop_in(*command, f"WatchdogSec={watchdog_s:g}s", *variables)

    def start(self) -> Entry:
        """Returns when systemd says that it started; the ``online`` event."""
        since_s = self.journal.mark()
        done = self.lab.systemctl("start", self.unit, check=False)
        assert done.returncode == 0, f"{done.stderr}{self.journal.tail(since_s)}"
        return self.online(since_s)

    def stop(self) -> None:
        self.lab.systemctl("stop", self.unit)

    def online(self, since_s: float, timeout_s: float = 60.0) -> Entry:
        return self.journal.event(self.unit, "online", since_s, timeout_s)

    def event(self, name: str, since_s: float, timeout_s: float = 60.0, **fields: str) -> Entry:
        return self.journal.event(self.unit, name, since_s, timeout_s, **fields)

    def text(self, part: str, since_s: float, timeout_s: float = 60.0) -> Entry:
        return self.journal.text(self.unit, part, since_s, timeout_s)

    def show(self, name: str) -> str:
        """One property of the unit."""
        return self.lab.show(self.unit, name)[name]

    @property
    def pid(self) -> int:
        """Of the daemon, as processes inside see it."""
        return int(self.show("MainPID"))

    @property
    def p2pd_pid(self) -> int:
        """Of the daemon's only child."""
        tasks = self.lab.path(f"/proc/{self.pid}/task").iterdir()
        (child,) = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        return child

    def signal(self, name: str) -> float:
        """To the daemon, not to its child; when it was sent."""
        since_s = self.journal.mark()
        self.lab.systemctl("kill", "--kill-whom=main", f"--signal={name}", self.unit)
        return self.text(f"Sent signal {name} to main process", since_s).monotonic_s

    def ctl(self, *words: str, check: bool = True) -> Any:
        """``petalsctl --json``: the document, or the last of several."""
        done = self.lab.run(["petalsctl", "-i", self.name, "--json", *words], check=check)
        return json.loads(done.stdout.splitlines()[-1])

    def warnings(self) -> dict[str, str]:
        """Code to title of what is wrong, as ``petalsctl status`` has it."""
        status = self.ctl("status", check=False)
        return {warning["code"]: warning["title"] for warning in status["warnings"]}


def maddr_of(online: Entry) -> str:
    """Where clients find it."""
    return str(json.loads(online["maddrs"])[0])
