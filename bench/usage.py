"""What processes have used, their descendants included: CPU, memory, descriptors. Known on Linux only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20


class Usage(NamedTuple):
    """What a process and its descendants hold."""

    rss_mib: float
    fds: int


def known() -> bool:
    """Say whether this system tells what a process uses."""
    return sys.platform == "linux"


def family(pid: int) -> list[int]:
    """Return the process and its descendants."""
    members = [pid]
    for member in members:  # grows meanwhile
        try:
            for task in Path(f"/proc/{member}/task").iterdir():
                members += map(int, (task / "children").read_text().split())
        except FileNotFoundError:  # it has ended
            pass
    return members


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of the processes so far, of their ended threads, too; to the ns, unlike /proc/PID/stat."""
    total = 0.0
    for pid in pids:
        try:
            # <linux/posix-timers.h>: the clock of a process's CPU time is made from its pid; 2 is the scheduler's.
            total += time.clock_gettime((~pid << 3) | 2)
        except OSError:  # it has ended
            pass
    return total


def usage(pids: Iterable[int]) -> Usage:
    """Return what the processes hold at this moment."""
    memory, descriptors = 0, 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            memory += int(status.partition("VmRSS:")[2].split()[0]) * 1024
            descriptors += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        except (FileNotFoundError, IndexError):  # it has ended
            pass
    return Usage(round(memory / MIB, 1), descriptors)
