"""What comes of a run of the demo, and who watches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from zmqcore.cli.demo.analysis import Analysis

__all__ = ["DemoFailed", "Observer", "Report", "compare"]


class DemoFailed(Exception):
    """The demo could not be run to its end; the text says why."""


class Observer(Protocol):
    """Who watches a run. All methods are called on the main thread."""

    def phase(self, title: str, total: int | None) -> None:
        """Say that a phase begins; *total* is its number of steps, None if there is nothing to count."""

    def progress(self, done: int, detail: str) -> None:
        """Say how many steps of the phase are done."""

    def event(self, text: str) -> None:
        """Say that something worth a line has happened."""


@dataclass(slots=True)
class Report:
    """What came of a run. ``problems`` is empty exactly if everything was as it should be."""

    problems: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    tokens: int = 0
    lines: int = 0
    not_python: int = 0
    calls: int = 0
    retries: int = 0
    retried_for: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    checked: int = 0
    seconds: float = 0.0
    files_per_second: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    events: int = 0
    events_expected: int = 0
    killed: dict[str, Any] | None = None
    epoch: int = 0
    workers: list[dict[str, Any]] = field(default_factory=list)
    fds_before: int | None = None
    fds_peak: int | None = None
    node: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was missing, wrong or otherwise unexpected."""
        return not self.problems


def compare(
    results: dict[int, Analysis], reference: dict[int, Analysis], total: int
) -> tuple[list[int], list[int], list[int]]:
    """Compare what came by RPC with what was computed without; return the missing, the wrong and the
    unchecked.

    Each is a sorted list of indices below *total*; an index is in one of them at most.
    """
    missing = [index for index in range(total) if index not in results]
    unchecked = [index for index in range(total) if index in results and index not in reference]
    wrong = [
        index
        for index in range(total)
        if index in results and index in reference and results[index] != reference[index]
    ]
    return missing, wrong, unchecked
