"""Measured processes: started, asked and ended; and who else uses the CPUs meanwhile."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PeerFailed", "Process", "busy_seconds"]

# How long a process may take to end by itself when its input has ended, in seconds.
_END_TIMEOUT = 5.0


class PeerFailed(RuntimeError):
    """A measured process ended, reported a fault, or did not answer in time."""


class Process:
    """One measured process, which answers a line by a line of JSON. ``end()`` ends it; so does our own end."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.command = command
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            bufsize=0,
        )
        self._rest = b""

    def read(self, timeout: float = 30.0) -> dict[str, Any]:
        """Return the next answer; raise PeerFailed if there is none within *timeout* seconds, or an error."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise PeerFailed(f"{self.name}: no answer within {timeout:g} s")
            more = os.read(self._process.stdout.fileno(), 65536)
            if not more:
                self._process.wait()
                raise PeerFailed(f"{self.name}: ended with {self._process.returncode}; {self._last_words()}")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, command: str, timeout: float = 30.0) -> dict[str, Any]:
        """Send a command and return the answer; raise as read() does."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command.encode() + b"\n")
        except BrokenPipeError:
            pass  # read() says why
        return self.read(timeout)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    @property
    def name(self) -> str:
        """The command without its paths."""
        return " ".join(word.rpartition("/")[2] if word.startswith("/") else word for word in self.command)

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        return text[-2000:] or "nothing on its standard error"

    def end(self) -> None:
        """Close its input, which ends it; kill it if that does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def busy_seconds() -> float | None:
    """Return the CPU seconds that all CPUs were busy or taken by the host, to 10 ms; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(word) for word in stat.read_text().partition("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and iowait
