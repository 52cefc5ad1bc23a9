"""The processes of ``side_by_side.py``: started, asked, watched and ended; and when the machine is quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import floor

from zmqcore.cli.bench.processes import Process, busy_seconds

BENCH = Path(__file__).resolve().parent

QUIET_CPUS = 0.1
"""CPUs that others may keep busy on a machine that counts as quiet."""
QUIET_SECONDS = 0.3
"""How long it must have been quiet: 30 ticks of /proc/stat."""


class Pair:
    """A server and its client."""

    def __init__(self, server: Process, client: Process) -> None:
        self.server = server
        self.client = client

    def measure(self, command: str, seconds: float) -> dict[str, Any]:
        """Run one command at the client; add the CPU time per call, and how many CPUs others kept busy."""
        began, busy = time.monotonic(), busy_seconds()
        before = self.server.ask("cpu")["cpu"]
        answer = self.client.ask(command, timeout=60 + 10 * seconds)
        served = self.server.ask("cpu")["cpu"] - before
        if answer.get("total"):
            answer["cpu_us"] = (answer["cpu"] + served) * 1e6 / answer["total"]
            answer["client_cpu_us"] = answer["cpu"] * 1e6 / answer["total"]
        if busy is not None:
            theirs = (busy_seconds() or 0.0) - busy - answer["cpu"] - served
            answer["others"] = max(theirs, 0.0) / (time.monotonic() - began)
        return answer

    def end(self) -> None:
        self.client.end()
        self.server.end()


class Peers:
    """Starts the processes of every peer; ``scratch`` is where their ipc sockets go."""

    def __init__(self, scratch: Path, spin: float | None = None, libzmq: str | None = None) -> None:
        self.scratch = scratch
        self.spin = [] if spin is None else [f"--spin={spin}"]
        self.libzmq = libzmq or str(floor.libzmq_path())
        self.floor = floor.compiled()
        self.started = 0

    def command(self, peer: str, role: str, endpoint: str) -> list[str]:
        """Return the command line of ``peer`` in the ``role`` of "server" or "client"."""
        kind, _, form = peer.partition("-")
        if kind == "c":
            return [str(self.floor), self.libzmq, role, endpoint]
        if kind == "pyzmq":
            return [sys.executable, str(BENCH / "peers_pyzmq.py"), role, form or "plain", endpoint]
        options = [f"--workers={form.removeprefix('w')}"] if form.startswith("w") else []
        options += self.spin
        if form == "1cpu" and role == "client":
            options.append("--cpu=0")
        return [sys.executable, str(BENCH / "peers_zmqcore.py"), role, endpoint, *options]

    def start(self, names: Iterable[str], transport: str) -> dict[str, Pair]:
        """Start a pair for each name, all at once; on a failure none is left."""
        servers: dict[str, Process] = {}
        clients: dict[str, Process] = {}
        try:
            for name in names:
                self.started += 1
                tcp, ipc = "tcp://127.0.0.1:*", f"ipc://{self.scratch}/{self.started}"
                endpoint = tcp if transport == "tcp" else ipc
                servers[name] = Process(self.command(name, "server", endpoint))
            for name, server in servers.items():
                endpoint = server.read()["endpoint"]
                clients[name] = Process(self.command(name, "client", endpoint))
            for client in clients.values():
                client.read()
        except BaseException:
            for process in [*clients.values(), *servers.values()]:
                process.end()
            raise
        return {name: Pair(servers[name], clients[name]) for name in servers}


def wait_until_quiet(end: float) -> bool:
    """Wait until nothing runs on this machine for a moment; return False if that is not so before ``end``."""
    while True:
        began, busy = time.monotonic(), busy_seconds()
        time.sleep(QUIET_SECONDS)
        if busy is None or (busy_seconds() or 0.0) - busy < QUIET_CPUS * (time.monotonic() - began):
            return True
        if time.monotonic() >= end:
            return False
