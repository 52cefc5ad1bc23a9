"""How much memory a process that the tests start has used at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def reset_peak_rss() -> None:
    """Forget what the calling process has used so far, where that can be done: the peak is what it uses now."""
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")  # proc(5)


def peak_rss_bytes() -> int:
    """Return the calling process's largest resident size so far, or since reset_peak_rss().

    Not getrusage() on Linux: there a process begins with the figure of the one that has started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
