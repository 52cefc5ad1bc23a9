"""The demo's other processes: workers, the collector, and the checkers that compute without RPC.

They are started by :func:`command` and end when their standard input does, so none outlives the demo,
however that ends. Neither click nor rich is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zmqcore import Client, Node, Server, errors
from zmqcore.cli.demo.analysis import analyse
from zmqcore.cli.measure import open_fds

__all__ = ["ANALYSIS", "PROGRESS", "Collector", "Worker", "command", "main"]

ANALYSIS = "stdlib-analysis"
PROGRESS = "stdlib-progress"

# -P keeps the current directory out of the path: a file json.py there must not be imported by a demo. The
# path is handed over instead, so that the child finds the same zmqcore as its parent, installed or in a
# checkout.
_BOOT = """\
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from zmqcore.cli.demo.roles import main
sys.exit(main(sys.argv[1:]))
"""


def command(role: str, *words: str) -> list[str]:
    """Return the command that starts a process of the demo in the given *role* (see :func:`main`)."""
    return [
        sys.executable,
        "-P",
        "-c",
        _BOOT,
        json.dumps([entry or str(Path.cwd()) for entry in sys.path]),
        role,
        *words,
    ]


class Worker:
    """What the workers serve. Each event goes to the collector before the result goes to the caller."""

    def __init__(self, name: str, progress: Client) -> None:
        self._name = name
        self._progress = progress
        # Guards the counters: the server may run methods on several threads.
        self._lock = threading.Lock()
        self._run: str | None = None
        self._key = b""
        self._files = 0
        self._bytes = 0
        self._casts = 0
        self._casts_failed = 0

    def configure(self, run: str, key: bytes) -> None:
        """Take over the configuration of one run."""
        with self._lock:
            self._key = bytes(key)
            self._run = run

    def configured(self) -> str | None:
        """Return which run this worker is configured for."""
        return self._run

    def analyse(self, index: int, source: bytes | memoryview) -> dict[str, Any]:
        """Return the analysis of *source* and who made it."""
        if self._run is None:
            raise RuntimeError("not configured")
        result = analyse(source, self._key).as_message()
        try:
            self._progress.cast("event", index, self._name)
            failed = 0
        except errors.ZmqcoreError:
            failed = 1
        with self._lock:
            self._files += 1
            self._bytes += len(source)
            self._casts += 1 - failed
            self._casts_failed += failed
        return {**result, "server": self._name}

    def statistics(self) -> dict[str, Any]:
        """Return what this worker has done so far."""
        with self._lock:
            return {
                "server": self._name,
                "pid": os.getpid(),
                "files": self._files,
                "bytes": self._bytes,
                "casts": self._casts,
                "casts_failed": self._casts_failed,
                "fds": open_fds(),
            }


class Collector:
    """Counts the progress events."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[str, int] = {}
        self._seen: set[int] = set()

    def event(self, index: int, server: str) -> None:
        """Count that *server* has analysed the file of this *index*."""
        with self._lock:
            self._events[server] = self._events.get(server, 0) + 1
            self._seen.add(index)

    def counted(self) -> dict[str, Any]:
        """Return the number of events of each worker, and which files they were about."""
        with self._lock:
            return {"events": dict(self._events), "files": sorted(self._seen), "fds": open_fds()}


def _serve_until_stdin_ends(server: Server) -> None:
    with server:
        # Nothing is ever written to it: the demo closes it, or the kernel does when the demo dies.
        while os.read(0, 4096):
            pass


def _worker(name: str, matchmaker: str) -> None:
    with (
        Node(matchmaker=matchmaker) as node,
        Client(PROGRESS, node=node, timeout=10.0) as progress,
    ):
        _serve_until_stdin_ends(Server(ANALYSIS, Worker(name, progress), node=node, server=name, workers=1))


def _collector(matchmaker: str) -> None:
    with Node(matchmaker=matchmaker) as node:
        _serve_until_stdin_ends(Server(PROGRESS, Collector(), node=node, server="collector", workers=0))


def _checker(key: str) -> None:
    """Read a JSON list of [index, path] from stdin; write [index, analysis] for each, one JSON line each."""
    for index, path in json.load(sys.stdin):
        analysis = analyse(Path(path).read_bytes(), bytes.fromhex(key))
        print(json.dumps([index, analysis.as_message()]), flush=True)


def main(words: list[str]) -> int:
    """Run the role that *words* name: ``worker NAME URL``, ``collector URL`` or ``checker KEY``."""
    role, *rest = words
    roles: dict[str, Callable[..., None]] = {"worker": _worker, "collector": _collector, "checker": _checker}
    try:
        roles[role](*rest)
    except (KeyboardInterrupt, BrokenPipeError):
        return 1  # the demo is ending, and says so itself
    return 0
