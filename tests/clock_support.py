"""A clock for what is given one: no test sleeps to let a TTL pass."""

from __future__ import annotations


class Clock:
    """Seconds that pass when a test says so: ``clock.now += 5``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
