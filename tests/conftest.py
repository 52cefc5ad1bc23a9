"""What every test relies on: nothing is left behind, and a missing service is never missed silently."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import pytest

SETTLING_S = 5.0
"""How long closing may take. libzmq closes sockets and ends threads asynchronously, so we poll; a bound for a
leak to be called one, not a promise about speed."""

_FD_DIRECTORY = Path("/proc/self/fd")
_TASK_DIRECTORY = Path("/proc/self/task")


class Held(NamedTuple):
    """What the process holds now. Keys identify, values name."""

    fds: dict[tuple[int, str], str]
    threads: dict[int, str]
    counters: dict[str, int]
    kept_fds: int
    """How many of ``fds`` the core may keep for the next thread that waits: none while no socket is open."""

    @classmethod
    def now(cls) -> Held:
        counters = _counters()
        return cls(_open_fds(), _threads(), counters, counters.pop("waiters.idle", 0))

    def left_over(self, before: Held) -> list[str]:
        """Name what is held now and was not before.

        What only replaced its like (a reconnection of something that a wider fixture holds) is not left over.
        """
        lines = []
        if len(self.fds) - self.kept_fds > len(before.fds) - before.kept_fds:
            lines += [f"fd {name}" for key, name in sorted(self.fds.items()) if key not in before.fds]
        if len(self.threads) > len(before.threads):
            lines += [f"thread {name}" for key, name in self.threads.items() if key not in before.threads]
        lines += [
            f"counter {name}: {before.counters.get(name, 0)} -> {value}"
            for name, value in sorted(self.counters.items())
            if value > before.counters.get(name, 0)
        ]
        return lines


def _open_fds() -> dict[tuple[int, str], str]:
    """Without /proc (macOS) nothing is seen, and nothing is asserted."""
    fds = {}
    for entry in _FD_DIRECTORY.iterdir() if _FD_DIRECTORY.is_dir() else ():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the one that iterdir() itself had open, or one closed meanwhile
            continue
        fds[int(entry.name), target] = f"{entry.name} -> {target}"
    return fds


def _threads() -> dict[int, str]:
    """Python's threads, and libzmq's own: they are no Python threads and are known by their names only."""
    threads = {thread.native_id or 0: repr(thread) for thread in threading.enumerate()}
    for task in _TASK_DIRECTORY.iterdir() if _TASK_DIRECTORY.is_dir() else ():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("ZMQ"):
            threads[int(task.name)] = f"{name} (libzmq, tid {task.name})"
    return threads


def _counters() -> dict[str, int]:
    """What the core counts for itself, of those of its modules that this process has imported."""
    counters: dict[str, int] = {}
    if frame := sys.modules.get("zmqcore._frame"):
        counters |= {f"pinned.{name}": value for name, value in frame.pinned().items()}
    if socket := sys.modules.get("zmqcore._socket"):
        waiters = socket.waiters()
        counters["waiters.in_use"] = waiters["open"] - waiters["idle"]
        counters["sockets"] = socket.open_sockets()
        counters["waiters.idle"] = min(waiters["idle"], 16) if counters["sockets"] else 0
    return counters


def _wait_until_settled(before: Held) -> list[str]:
    give_up = time.monotonic() + SETTLING_S
    while left := Held.now().left_over(before):
        if time.monotonic() > give_up:
            return left
        # A cycle may hold a view. What should have been closed by hand warns, and a warning is an error here.
        gc.collect()
        time.sleep(0.01)
    return []


_failed = pytest.StashKey[bool]()


def pytest_configure() -> None:
    # What a shell script starts in the background ignores SIGINT, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (marker := item.get_closest_marker("untraced")) and os.environ.get("ZMQCORE_TRACE") == "1":
        pytest.skip(f"on a tracing build {marker.args[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        item.stash[_failed] = True
    return report


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Generator[None]:
    """Fail the test that leaves fds, threads or core counters behind.

    It is set up before and torn down after the test's own fixtures, and after those of wider scope, which
    therefore may hold what they like. A failed test is left alone: its traceback keeps its objects alive.
    """
    before = Held.now()
    yield
    if request.node.stash.get(_failed, False):
        return
    if left := _wait_until_settled(before):
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def require_service() -> Callable[[str], str]:
    """``require_service("redis-server")`` returns the binary's path.

    Where it is missing the test is skipped, and fails if ``ZMQCORE_REQUIRE_SERVICES=1`` (set in CI).
    """

    def require(binary: str) -> str:
        path = shutil.which(binary) or shutil.which(binary, path="/usr/sbin:/usr/local/bin:/usr/local/sbin")
        if path is None:
            if os.environ.get("ZMQCORE_REQUIRE_SERVICES") == "1":
                pytest.fail(f"{binary} is not installed, and ZMQCORE_REQUIRE_SERVICES=1", pytrace=False)
            pytest.skip(f"{binary} is not installed")
        return path

    return require
