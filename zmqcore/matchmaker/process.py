"""Whether another process of this host still lives, and which boot and namespace that is said of."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["boot_id", "lives", "namespace", "start_time"]


def boot_id() -> str:
    """What tells this boot of the host from an earlier one, as far as the system says so."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def namespace() -> str:
    """Where a pid and a start time mean what they mean here; empty if the system does not say."""
    names = []
    # The time namespace shifts start times; kernels before 5.6 have none.
    for kind in ("pid", "time"):
        try:
            names.append(str(Path(f"/proc/self/ns/{kind}").readlink()))
        except OSError:
            pass
    return " ".join(names)


def start_time(pid: int) -> int | None:
    """When the process started, in ticks since boot (proc_pid_stat(5), field 22); ``None`` if it is dead."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field is the program's name in brackets and may hold anything, also brackets.
    fields = text[text.rfind(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def lives(pid: int, started: int) -> bool:
    """Whether the process that had this pid and start time is alive; true where that cannot be told."""
    if start_time(pid) == started:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    # It is there: a zombie, another process with its pid, or one that /proc hides from us.
    return not Path(f"/proc/{pid}/stat").exists()
