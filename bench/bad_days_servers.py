"""The servers of ``bad_days.py``: those of the tests, of which ``recorder.py`` writes down what it runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from zmqcore.cli.bench.processes import Process

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / "tests" / "rpc" / "peer.py"
RECORDER = ROOT / "tests" / "rpc" / "recorder.py"
TOPIC = "t"
TIMEOUT = 60.0
"""Far above what anything takes: what ends before has been ended by the loss."""
RECORDS = "ZMQCORE_BAD_DAYS_RECORDS"
"""The environment variable with the directory into which Noting writes."""


class ServerProcess(Process):
    """A server of the tests, which has said where it listens."""

    def __init__(self, program: Path, **options: Any) -> None:
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        super().__init__(
            [sys.executable, str(program), json.dumps(options)], os.environ | {"PYTHONPATH": paths}
        )
        try:
            said = self.read()
        except BaseException:
            self.kill()
            raise
        self.endpoints: list[str] = said["endpoints"]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.end()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP, and wait until all its threads have stopped."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self.end()


def peer(name: str, **options: Any) -> ServerProcess:
    return ServerProcess(PEER, matchmaker="local://", topic=[TOPIC, name, ""], server=options)


@contextlib.contextmanager
def peers(count: int, **options: Any) -> Iterator[list[ServerProcess]]:
    """Start so many, and end them."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(peer(f"server-{number}", **options)) for number in range(count)]


def wait_until(condition: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"has not happened in {TIMEOUT:g} s: {what}")
        time.sleep(0.001)


class Recorded:
    """What runs of a server at one address have written down."""

    def __init__(self, directory: str) -> None:
        self.path = Path(directory) / "record"
        # An address that no connection begins at: meanwhile none takes the port, nor connects to itself.
        host = "127.77.0.1" if sys.platform == "linux" else "127.0.0.1"
        with socket.create_server((host, 0)) as listener:
            self.endpoint = f"tcp://{host}:{listener.getsockname()[1]}"
        self.runs = 0

    def start(self, **options: Any) -> ServerProcess:
        self.runs += 1
        server = {"bind": [self.endpoint], **options.pop("server", {})}
        where = {"matchmaker": "memory://", "topic": TOPIC, "path": str(self.path), "name": str(self.runs)}
        return ServerProcess(RECORDER, **where, server=server, **options)

    def counts(self, wanted: int) -> dict[str, int]:
        """Return how many of so many messages were executed, and how many more than once, by one run or by two."""
        first: dict[int, str] = {}
        twice_in_one_run = 0
        again: Counter[str] = Counter()  # by the run that had executed them before
        seen = set()
        for line in self.path.read_text().splitlines():
            run, _, number = line.split()
            if line in seen:
                twice_in_one_run += 1
            elif first.setdefault(int(number), run) != run:
                again[first[int(number)]] += 1
            seen.add(line)
        return {
            "executed": len(first),
            "missing": len(set(range(wanted)) - first.keys()),
            "twice_in_one_run": twice_in_one_run,
            "again_elsewhere": again.total(),
            "most_again_of_one_run": max(again.values(), default=0),
        }


class Noting:
    """What ServerProcesses serve: writes down each key, by one write."""

    def __init__(self) -> None:
        path = Path(os.environ[RECORDS]) / str(os.getpid())
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, key: str) -> str:
        os.write(self._file, f"{key}\n".encode())
        return key
