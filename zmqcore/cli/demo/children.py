"""The processes that the demo has started: each ends with the demo, however that ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

from zmqcore.cli.demo.report import DemoFailed
from zmqcore.cli.demo.roles import command

__all__ = ["END_TIMEOUT", "Children", "private_directory"]

#: How long processes may take to end by themselves before they are killed, in seconds.
END_TIMEOUT = 10.0
# The path of a Unix socket has room for 107 bytes, and names of sockets follow the directory.
_MAX_BASE_BYTES = 40


class Children:
    """The children, each with its standard input as its lifeline and its standard error in a file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._killed: set[str] = set()

    def start(self, name: str, role: str, *words: str, output: bool = False) -> subprocess.Popen[str]:
        environment = os.environ | {"ZMQCORE_RUNTIME_DIR": str(self._directory)}
        with self._stderr(name).open("wb") as stderr:
            process = subprocess.Popen(
                command(role, *words),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if output else subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                text=True,
                encoding="utf-8",
                # The terminal's Ctrl-C is for the demo alone, which then ends them.
                start_new_session=True,
            )
            self._running[name] = process
        return process

    def _stderr(self, name: str) -> Path:
        return self._directory / f"{name}.stderr"

    def complaint(self, name: str) -> str:
        """Return the last line that the process of this name has written to its standard error."""
        with contextlib.suppress(OSError):
            lines = self._stderr(name).read_text("utf-8", "replace").strip().splitlines()
            if lines:
                return lines[-1]
        return "it said nothing"

    def expect_running(self) -> None:
        """Raise DemoFailed if a process has ended that was not killed by us."""
        for name, process in self._running.items():
            if process.poll() is not None and name not in self._killed:
                raise DemoFailed(f"{name} ended with code {process.returncode}: {self.complaint(name)}")

    def kill(self, name: str) -> int:
        """SIGKILL the process of this name and return its pid."""
        process = self._running[name]
        self._killed.add(name)
        process.kill()
        process.wait()
        return process.pid

    def end(self, names: list[str] | None = None) -> list[str]:
        """End processes (all if None) by closing their lifelines; return complaints about bad ends."""
        ending = {name: self._running[name] for name in (names if names is not None else list(self._running))}
        for process in ending.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        complaints = []
        deadline = time.monotonic() + END_TIMEOUT
        for name, process in ending.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                complaints.append(f"{name} did not end within {END_TIMEOUT:g} s and was killed")
                process.kill()
                process.wait()
            else:
                if process.returncode != 0 and name not in self._killed:
                    complaints.append(f"{name} ended with code {process.returncode}: {self.complaint(name)}")
            self._forget(name)
        return complaints

    def _forget(self, name: str) -> None:
        process = self._running.pop(name)
        if process.stdout is not None:
            process.stdout.close()

    def close(self) -> None:
        """Kill and reap whatever still runs."""
        for process in self._running.values():
            process.kill()
        for name, process in list(self._running.items()):
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            process.wait()
            self._forget(name)


def private_directory() -> Path:
    """Make a directory that nobody else can read, under a path that leaves room for the names of sockets."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _MAX_BASE_BYTES:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="zmqcore-demo-", dir=base))
