"""Requests that have been received and wait for their turn: a bounded queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal

from zmqcore._request import Request

__all__ = ["Backlog", "OnFull", "check_queue"]

OnFull = Literal["wait", "reject"]

#: What every server answers about itself: also when it is full, as this is when one wants to know.
_BUILTIN = "zmqcore."


def check_queue(queue_size: int, on_full: OnFull) -> None:
    """Raise ValueError for options that no queue can have."""
    if queue_size < 1:
        raise ValueError(f"queue_size is {queue_size}; it must be at least 1")
    if on_full not in ("wait", "reject"):
        raise ValueError(f"on_full is {on_full!r}; it must be 'wait' or 'reject'")


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
            if len(self) < room or not request.wants_reply or request.method.startswith(_BUILTIN):
                self.append(request)
            else:
                rejected.append(request)
        return rejected
