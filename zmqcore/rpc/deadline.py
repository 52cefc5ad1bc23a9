"""The deadline of the request that is being handled: what a handler calls in turn inherits what is left."""

from __future__ import annotations

import time
from contextvars import ContextVar

from zmqcore import errors

__all__ = ["check_time", "current", "seconds_until", "tighten", "time_left"]

#: A time of ``time.monotonic()``, or None outside a handler and in one whose caller set no deadline.
current: ContextVar[float | None] = ContextVar("zmqcore_deadline", default=None)


def time_left() -> float | None:
    """Return how many seconds are left for the request that is being handled; None if there is no limit."""
    deadline = current.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def tighten(timeout: float | None, started: float | None = None) -> float | None:
    """Return the deadline, as a time of ``time.monotonic()``, for an operation that may take ``timeout`` seconds.

    Counted from ``started``, default now. Never later than that of the request being handled.
    """
    inherited = current.get()
    if timeout is None:
        return inherited
    own = (time.monotonic() if started is None else started) + timeout
    return own if inherited is None or own < inherited else inherited


def seconds_until(deadline: float | None) -> float | None:
    """Return the seconds until ``deadline``, a time of ``time.monotonic()``; 0 if it has passed."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    return left if left > 0 else 0.0


def check_time(deadline: float | None) -> float | None:
    """Return the seconds until ``deadline``, or raise DeadlineExceeded if there are none."""
    left = seconds_until(deadline)
    if left == 0.0:
        error = errors.DeadlineExceeded("the deadline had passed before anything was sent")
        error.sent = False
        raise error
    return left
