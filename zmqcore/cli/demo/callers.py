"""The threads that call: each file goes to a worker, and again to another one if that is lost."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zmqcore import Client, errors

__all__ = ["Callers", "Done"]

# A call that is lost is asked again of another worker; after so many times something else is wrong.
_MAX_ATTEMPTS = 10
# What a member that has gone, or has not come yet, makes of a call. Analysis is idempotent, so it may be
# repeated.
_RETRIED = (
    errors.PeerLost,
    errors.Unreachable,
    errors.Overloaded,
    errors.NoSuchTopic,
    errors.DeadlineExceeded,
)


@dataclass(frozen=True, slots=True)
class Done:
    """One file's result, or why there is none."""

    index: int
    size: int
    seconds: float
    answer: dict[str, Any] | None
    failure: str = ""


class Callers:
    """Threads that share one client and call until no file is left.

    *abandon* makes the calls that run fail at once.
    """

    def __init__(
        self, client: Client, files: list[Path], threads: int, abandon: Callable[[], object]
    ) -> None:
        self._client = client
        self._abandon = abandon
        self._files = files
        self._left = deque(range(len(files)))
        self._stop = threading.Event()
        self.done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        # One entry per call that was repeated, the name of its error. Appending is atomic.
        self.retried: deque[str] = deque()
        self._threads = [threading.Thread(target=self._work, name=f"caller-{n}") for n in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Begin no further call, abandon those that run, and wait for the threads."""
        self._stop.set()
        if any(thread.is_alive() for thread in self._threads):
            self._abandon()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                index = self._left.popleft()
            except IndexError:
                return
            try:
                self.done.put(self._analyse(index))
            except Exception as exc:  # noqa: BLE001 - or the demo would wait for it for ever
                self.done.put(Done(index, 0, 0.0, None, f"{type(exc).__name__}: {exc}"))

    def _analyse(self, index: int) -> Done:
        source = self._files[index].read_bytes()
        failure = ""
        for attempt in range(_MAX_ATTEMPTS):
            # No pause before the second attempt: there are other workers to ask.
            if self._stop.wait(0.05 * attempt if attempt > 1 else 0):
                break
            started = time.perf_counter()
            try:
                answer = self._client.call("analyse", index, source)
            except _RETRIED as exc:
                failure = f"{type(exc).__name__}: {exc}"
                self.retried.append(type(exc).__name__)
                continue
            return Done(index, len(source), time.perf_counter() - started, answer)
        return Done(index, len(source), 0.0, None, f"given up after {_MAX_ATTEMPTS} attempts: {failure}")
