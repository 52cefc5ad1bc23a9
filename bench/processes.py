"""The measured processes: started, asked, watched and ended; and who else uses the CPUs meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import floor

BENCH = Path(__file__).resolve().parent

QUIET_CPUS = 0.1
"""CPUs that others may keep busy on a machine that counts as quiet."""
QUIET_SECONDS = 0.3
"""How long it must have been quiet: 30 ticks of /proc/stat."""


class PeerFailed(RuntimeError):
    """A measured process ended, reported a fault, or did not answer in time."""


class Process:
    """One measured process; a context manager that ends it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.command = command
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            bufsize=0,
        )
        self.rest = b""

    def read(self, timeout: float = 30.0) -> dict[str, Any]:
        """Return the next answer; raise ``PeerFailed`` if there is none within ``timeout`` seconds."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise PeerFailed(f"{self.name}: no answer within {timeout:g} s")
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                self.process.wait()
                raise PeerFailed(f"{self.name}: ended with {self.process.returncode}; {self.last_words()}")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, command: str, timeout: float = 30.0) -> dict[str, Any]:
        """Send a command and return the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command.encode() + b"\n")
        except BrokenPipeError:
            pass  # read() says why
        return self.read(timeout)

    @property
    def name(self) -> str:
        """The command without its paths."""
        return " ".join(word.rpartition("/")[2] if word.startswith("/") else word for word in self.command)

    def last_words(self) -> str:
        """Return the end of what the process wrote to its standard error."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()[-2000:] or "nothing on its standard error"

    def end(self) -> None:
        """Close its input, which ends it; kill it if that does not."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


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
        self.environment = dict(os.environ)
        if importlib.util.find_spec("zmqcore") is None:  # not installed, but perhaps built in place
            paths = [str(BENCH.parent), os.environ.get("PYTHONPATH", "")]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
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
        workers = form.removeprefix("w") or "0"
        options = [f"--workers={workers}", *self.spin]
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
                servers[name] = Process(self.command(name, "server", endpoint), self.environment)
            for name, server in servers.items():
                endpoint = server.read()["endpoint"]
                clients[name] = Process(self.command(name, "client", endpoint), self.environment)
            for client in clients.values():
                client.read()
        except BaseException:
            for process in [*clients.values(), *servers.values()]:
                process.end()
            raise
        return {name: Pair(servers[name], clients[name]) for name in servers}


def busy_seconds() -> float | None:
    """Return the CPU seconds that all CPUs were busy or taken by the host, to 10 ms; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(word) for word in stat.read_text().partition("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait


def wait_until_quiet(end: float) -> bool:
    """Wait until nothing runs on this machine for a moment; return False if that is not so before ``end``."""
    while True:
        began, busy = time.monotonic(), busy_seconds()
        time.sleep(QUIET_SECONDS)
        if busy is None or (busy_seconds() or 0.0) - busy < QUIET_CPUS * (time.monotonic() - began):
            return True
        if time.monotonic() >= end:
            return False
