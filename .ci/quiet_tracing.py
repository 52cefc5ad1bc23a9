"""A plugin of coverage.py: Cython's own, kept out of the way of what tests do: fork, interrupt, start many processes.

The tracer calls its plugin for each line and each function, and takes a lock now and then. A signal handler that
runs in Python code there raises its KeyboardInterrupt there: it is lost, and no Cython line is counted any more.
And a child that is forked while another thread holds the lock waits for ever. So what is called is compiled, and
there is no lock: it guards sets and dictionaries whose single operations are atomic under the GIL.

Cython's plugin reads the C files to find the lines of their sources, in each process that a test starts; only the
report needs them.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import Cython.Coverage
from coverage.collector import Collector
from coverage.plugin import FileTracer


class Source(FileTracer):
    """A .pyx or .pxd: whatever runs under its name is counted for it."""

    #: Of a frame the first and the last line.
    line_number_range = operator.attrgetter("f_lineno", "f_lineno")

    def __init__(self, path: str) -> None:
        self._path = path

    def source_filename(self) -> str:
        return self._path


class Plugin(Cython.Coverage.Plugin):
    """Reports as Cython's does."""

    def file_tracer(self, filename: str) -> Source | None:
        path = Path(filename)
        return Source(filename) if path.suffix in (".pyx", ".pxd") and path.is_file() else None


def coverage_init(registry: Any, options: dict[str, str]) -> None:  # noqa: ARG001 - what coverage.py calls
    # Called without an argument, it does nothing but to make something that nobody looks at.
    Collector.lock_data = Collector.unlock_data = staticmethod(object)
    plugin = Plugin()
    registry.add_configurer(plugin)
    registry.add_file_tracer(plugin)
