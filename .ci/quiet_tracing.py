"""A plugin of coverage.py that keeps its tracer out of the way of what the tests do: fork, and interrupt.

The tracer calls Python functions for each line. In one of them it takes a lock: a child that is forked while another
thread holds it would wait for ever. And a signal handler that runs in one of them raises its KeyboardInterrupt there:
it is lost, and no Cython line is counted any more. So what is called is compiled, and there is no lock: it guards
sets and dictionaries whose single operations are atomic under the GIL.
"""

from __future__ import annotations

import operator
from typing import Any

from coverage.collector import Collector
from Cython.Coverage import CythonModuleTracer


def coverage_init(registry: Any, options: dict[str, str]) -> None:  # noqa: ARG001 - what coverage.py calls
    # Called without an argument, it does nothing but to make something that nobody looks at.
    Collector.lock_data = Collector.unlock_data = staticmethod(object)
    # Of a frame the first and the last line: the same, as what is inherited says.
    CythonModuleTracer.line_number_range = operator.attrgetter("f_lineno", "f_lineno")
