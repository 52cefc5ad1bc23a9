"""Small measurements that several commands report."""

from __future__ import annotations

import math
from pathlib import Path

__all__ = ["open_fds", "percentile"]


def open_fds() -> int | None:
    """Return how many file descriptors this process holds, or None where the system does not tell."""
    for directory in ("/proc/self/fd", "/dev/fd"):
        try:
            return sum(1 for _ in Path(directory).iterdir()) - 1  # one is the listing's own
        except OSError:
            continue
    return None


def percentile(ordered: list[float], share: float) -> float:
    """Return the value at *share* (0 to 1) of the sorted *ordered* (nearest rank); NaN if it is empty."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]
