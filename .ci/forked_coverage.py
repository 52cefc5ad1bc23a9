"""A plugin of coverage.py that lets forked children be measured.

A traced line takes a lock of coverage's. Threads of the parent may hold it while another one forks, and then nobody
ever releases it in the child, whose next line would wait for ever.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from coverage.collector import Collector


def _renew_locks() -> None:
    for collector in Collector._collectors:  # noqa: SLF001 - there is no public way to them
        collector.data_lock = threading.Lock()


def coverage_init(registry: Any, options: dict[str, str]) -> None:  # noqa: ARG001 - what coverage.py calls
    os.register_at_fork(after_in_child=_renew_locks)
