"""Requests that have been received and wait for their turn: a bounded queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal

from zmqcore import options
from zmqcore._request import Request

__all__ = ["Backlog", "OnFull", "check_queue", "check_workers", "is_builtin"]

OnFull = Literal["wait", "reject"]

#: What every server answers about itself: also when it is full, as this is when one wants to know.
_BUILTIN = "zmqcore."


def check_queue(queue_size: int, on_full: OnFull) -> tuple[int, OnFull]:
    """Return both. Raises ValueError or TypeError for options that no queue can have."""
    return options.whole("queue_size", queue_size, 1), options.choice("on_full", on_full, "wait", "reject")


def check_workers(workers: int, on_full: OnFull) -> int:
    """Return ``workers``. Raises ValueError or TypeError for what cannot be, or not with ``on_full``."""
    workers = options.whole("workers", workers, 0)
    if on_full == "reject" and not workers:
        raise ValueError(
            "on_full is 'reject' and workers is 0: then there is no queue; give workers=1 at least"
        )
    return workers


def is_builtin(method: str) -> bool:
    """Whether it is something that every server answers about itself."""
    return method.startswith(_BUILTIN)


class Backlog(deque[Request]):
    """Up to ``size`` requests. Beyond that, ``on_full``: "wait" for room, or "reject" calls. Not thread-safe by itself.

    It is asked whether it is :attr:`full` before more is received, and a batch that has been received is taken whole,
    so that it may hold a batch more. One-way messages cannot be answered and are never rejected: of them as many again
    may wait, before a queue that rejects is full, too.
    """

    def __init__(self, size: int, on_full: OnFull) -> None:
        super().__init__()
        self.size = size
        self._rejects = on_full == "reject"
        self._read_up_to = 2 * size if self._rejects else size

    @property
    def full(self) -> bool:
        """Whether nothing more should be received now."""
        return len(self) >= self._read_up_to

    def admit(self, batch: list[Request], idle: int) -> Iterable[Request]:
        """Take in ``batch``, while ``idle`` workers are about to take something out; return what is to be rejected."""
        if not self._rejects or len(self) + len(batch) <= self.size + idle:
            self.extend(batch)
            return ()
        room = self.size + idle
        rejected = []
        for request in batch:
            if len(self) < room or not request.wants_reply or is_builtin(request.method):
                self.append(request)
            else:
                rejected.append(request)
        return rejected
