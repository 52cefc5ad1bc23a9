"""``zmqcore bench`` without its face: rounds of measurements, and what they come to.

Where the scheduler has put processes changes a round trip by a factor of two for as long as they live. So each round
starts fresh ones, measures both systems one right after the other, and what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import zmq

from zmqcore import __version__
from zmqcore.cli.bench.peer import IN_FLIGHT
from zmqcore.cli.bench.processes import Process, busy_seconds

__all__ = ["SYSTEMS", "Result", "Run", "run_rounds"]

SYSTEMS = ("zmqcore", "pyzmq")
_TASKS = {
    "call": "a call",
    "inflight": f"{IN_FLIGHT} calls in flight",
    "cast": "casts",
}
# One measurement, in seconds: short, so that there are many rounds.
_SLICE = 0.1
# Before it: a connection that has just been made, or has been idle, is slower.
_WARM_UP = 0.02
_START_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """What the rounds say of one task over one transport.

    ``rounds`` has for each round what each system's processes have reported. A ratio is time by time: what a message
    takes zmqcore, divided by what it takes bare pyzmq.
    """

    task: str
    transport: str
    rounds: list[dict[str, dict[str, float]]]

    @property
    def title(self) -> str:
        """The task in words."""
        return _TASKS[self.task]

    def median(self, system: str, figure: str) -> float:
        """Return the median over the rounds of what *system* has reported as *figure*."""
        return statistics.median(measured[system][figure] for measured in self.rounds)

    def ratios(self) -> list[float]:
        """Return the ratio of each round, sorted."""
        return sorted(self._ratio(measured) for measured in self.rounds)

    def _ratio(self, measured: dict[str, dict[str, float]]) -> float:
        ours, bare = (measured[system] for system in SYSTEMS)
        if self.task == "call":
            return ours["p50_us"] / bare["p50_us"]
        return bare["per_second"] / ours["per_second"]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios())

    def as_json(self) -> dict[str, Any]:
        """Return everything that is known of it."""
        ratios = self.ratios()
        return {
            "task": self.task,
            "transport": self.transport,
            "ratio": round(self.ratio, 4),
            "lowest_ratio": round(ratios[0], 4),
            "highest_ratio": round(ratios[-1], 4),
            "median": {
                system: {figure: round(self.median(system, figure), 3) for figure in self.rounds[0][system]}
                for system in SYSTEMS
            },
            "rounds": self.rounds,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """All results, how many rounds they are from, and how many CPUs others kept busy meanwhile (None: unknown)."""

    results: list[Result]
    rounds: int
    others_cpus: float | None
    size: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return everything that is known of it, with versions and settings."""
        return {
            "versions": {
                "zmqcore": __version__,
                "pyzmq": zmq.pyzmq_version(),
                "libzmq": zmq.zmq_version(),
                "msgpack": ".".join(map(str, msgpack.version)),
                "python": platform.python_version(),
            },
            "machine": {
                "system": platform.system(),
                "architecture": platform.machine(),
                "cpus": os.cpu_count(),
            },
            "settings": {"size_bytes": self.size, "slice_seconds": _SLICE, "in_flight": IN_FLIGHT},
            "seconds": round(self.seconds, 2),
            "rounds": self.rounds,
            "others_cpus": None if self.others_cpus is None else round(self.others_cpus, 3),
            "results": [result.as_json() for result in self.results],
        }


def _cpu_seconds(*processes: Process) -> float:
    return sum(float(process.ask("cpu")["cpu_seconds"]) for process in processes)


class _Round:
    """The processes of one round: a server and a client of each system, over each transport."""

    def __init__(self, directory: Path, number: int, transports: tuple[str, ...], size: int) -> None:
        self._directory, self._number, self._size = directory, number, size
        self._servers: dict[tuple[str, str], Process] = {}
        self._clients: dict[tuple[str, str], Process] = {}
        try:
            # All are started before any is waited for: most of the time goes to importing.
            for pair in [(transport, system) for transport in transports for system in SYSTEMS]:
                self._servers[pair] = self._start("server", pair[1], self._bind(*pair))
            for pair, server in self._servers.items():
                endpoint = server.read(_START_TIMEOUT)["endpoint"]
                self._clients[pair] = self._start("client", pair[1], endpoint)
            for client in self._clients.values():
                client.read(_START_TIMEOUT)
        except BaseException:
            self.end()
            raise

    def _bind(self, transport: str, system: str) -> str:
        if transport == "tcp":
            return "tcp://127.0.0.1:*"
        return f"ipc://{self._directory}/{system}-{self._number}"

    def _start(self, role: str, system: str, endpoint: str) -> Process:
        module = "zmqcore.cli.bench.peer"
        return Process([sys.executable, "-P", "-m", module, role, system, str(self._size), endpoint])

    def measure(self, task: str, transport: str, system: str) -> dict[str, float]:
        """Return what the client has reported; and ``cpu_us``, what a message costs both processes."""
        server, client = self._servers[transport, system], self._clients[transport, system]
        client.ask(f"{task} {_WARM_UP}", _START_TIMEOUT)
        before = _cpu_seconds(server, client)
        measured = client.ask(f"{task} {_SLICE}", _START_TIMEOUT)
        cpu = _cpu_seconds(server, client) - before
        return {**measured, "cpu_us": round(cpu * 1e6 / measured["messages"], 3)}

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that all of them have used so far."""
        return _cpu_seconds(*self._servers.values(), *self._clients.values())

    def end(self) -> None:
        """End all of them."""
        for process in [*self._clients.values(), *self._servers.values()]:
            process.end()


class _Rounds:
    """What all rounds so far have measured, and who else has used the CPUs."""

    def __init__(self, transports: tuple[str, ...]) -> None:
        self.number = 0
        self._measured: dict[tuple[str, str], list[dict[str, dict[str, float]]]] = {
            (task, transport): [] for task in _TASKS for transport in transports
        }
        self._others_seconds = self._seconds = 0.0

    def run(self, processes: _Round, progress: Callable[[], object]) -> None:
        """Measure everything once."""
        # Whoever is first has no advantage in the end.
        systems = SYSTEMS if self.number % 2 == 0 else SYSTEMS[::-1]
        began, busy, own = time.monotonic(), busy_seconds() or 0.0, processes.cpu_seconds()
        for (task, transport), measured in self._measured.items():
            measured.append({system: processes.measure(task, transport, system) for system in systems})
            progress()
        own = processes.cpu_seconds() - own
        self._others_seconds += (busy_seconds() or 0.0) - busy - own
        self._seconds += time.monotonic() - began
        self.number += 1

    @property
    def others_cpus(self) -> float | None:
        """How many CPUs others kept busy while something was measured; None where the system does not tell."""
        return None if busy_seconds() is None else max(self._others_seconds / self._seconds, 0.0)

    def results(self) -> list[Result]:
        """Return what they come to."""
        return [Result(task, transport, measured) for (task, transport), measured in self._measured.items()]


def run_rounds(
    directory: Path,
    *,
    seconds: float,
    size: int,
    transports: tuple[str, ...],
    progress: Callable[[float], object],
) -> Run:
    """Measure for about *seconds*, one round at least, with payloads of *size* bytes.

    *directory* is where the sockets go. ``progress(share)`` is told now and then what share of the time is over. Raises
    PeerFailed if a process fails.
    """
    began = time.monotonic()
    rounds = _Rounds(transports)
    longest = 0.0
    # A round is begun only if it can be expected to end in time.
    while rounds.number == 0 or time.monotonic() - began + longest <= seconds:
        round_began = time.monotonic()
        processes = _Round(directory, rounds.number, transports, size)
        try:
            rounds.run(processes, lambda: progress(min((time.monotonic() - began) / seconds, 1.0)))
        finally:
            processes.end()
        longest = max(longest, time.monotonic() - round_began)
    elapsed = time.monotonic() - began
    return Run(rounds.results(), rounds.number, rounds.others_cpus, size, elapsed)
