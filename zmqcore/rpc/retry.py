"""What is tried again: how often, after which pause, and for how much of the traffic."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from zmqcore import errors, options
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.deadline import seconds_until

__all__ = ["Retry", "RetryBudget", "Retryable", "Search"]

#: What place() goes on after, unless the policy says no: the member has not taken the request, or may not have.
Retryable = (errors.Unreachable, errors.PeerLost, errors.Overloaded)

#: Between two rounds over members that cannot be reached: first and longest pause, in seconds.
_PAUSE, _PAUSE_MAX = 0.02, 0.5
#: How many retries a family of clients has in hand at most, so that those with little traffic can retry at all.
_RESERVE = 10.0
#: The longest pause, in seconds: about 30 years, which is never.
_LONGEST = 1e9


@dataclass(frozen=True, slots=True)
class Retry:
    """How a call is tried again after it has been sent, and certainly not executed or declared idempotent.

    ``attempts``: how often it is sent in all. ``backoff`` and ``backoff_max``, in seconds: before the n-th retry a
    random time between 0 and ``backoff * 2**(n - 1)`` passes ("full jitter"), at most ``backoff_max``; none if there
    is a member that has not been tried yet. ``budget``: how many retries and hedges there may be per call, on average
    over all calls of a client and its variations; besides, they have 10 in hand. 0.1 are 10 % more traffic.
    """

    attempts: int = 3
    backoff: float = 0.05
    backoff_max: float = 2.0
    budget: float = 0.1

    def __post_init__(self) -> None:
        checked = {
            "attempts": options.whole("attempts", self.attempts, 1),
            "backoff": options.seconds("backoff", self.backoff, 0, _LONGEST, above=True),
            "backoff_max": options.seconds("backoff_max", self.backoff_max, 0, _LONGEST, above=True),
            "budget": options.number("budget", self.budget, 0, 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.backoff > self.backoff_max:
            raise ValueError(
                f"backoff is {self.backoff!r} s; it must be at most backoff_max, {self.backoff_max!r} s"
            )

    def pause(self, retry: int) -> float:
        """Return how long to wait before the ``retry``-th retry, counted from 1, in seconds: a random time."""
        return random.uniform(0.0, min(self.backoff_max, self.backoff * 2.0 ** min(retry - 1, 60)))


class RetryBudget:
    """What retries a family of clients can afford: each call earns a share of one. Thread-safe.

    ``short``: whether anything is missing from the reserve. If not, which is nearly always, calls need not earn.
    """

    def __init__(self) -> None:
        self.short = False
        self._balance = _RESERVE
        self._lock = threading.Lock()

    def earn(self, share: float) -> None:
        """A call is made."""
        with self._lock:
            self._balance = min(_RESERVE, self._balance + share)
            self.short = self._balance < _RESERVE

    def spend(self) -> bool:
        """Return whether there is a retry left, and take it."""
        with self._lock:
            # A hundredth too little is what adding tenths does.
            if self._balance < 0.99:
                return False
            self._balance -= 1.0
            self.short = True
            return True


class Search:
    """What one operation has tried, in rounds over the members with pauses between them.

    A member that cannot be reached, or takes nothing new, costs nothing: the next one is tried, until ``patience``
    seconds after the first full round. A request that was sent and rejected, or lost, is sent again if ``retry`` and
    ``budget`` allow it; a lost one only if it is ``idempotent``. Nothing goes on beyond the deadline.
    """

    #: Whom it is about now; None before the first one.
    target: Target | None = None
    # What the many operations never set that succeed at once.
    tried: Sequence[Target] = ()
    failure: errors.ZmqcoreError | None = None
    _retries = 0
    _until = 0.0
    _pause = _PAUSE
    _was_sent = False

    def __init__(
        self,
        deadline: float | None,
        patience: float,
        retry: Retry | None,
        budget: RetryBudget,
        idempotent: bool,
    ) -> None:
        self.deadline = deadline
        self._patience = patience
        self._retry = retry
        self._budget = budget
        self._idempotent = idempotent

    def goes_on(self, target: Target, exc: errors.Unreachable | errors.PeerLost | errors.Overloaded) -> bool:
        """``target`` has not answered the request, because of ``exc``: return whether another one may be tried."""
        lost = isinstance(exc, errors.PeerLost) and exc.executed_possible
        self._was_sent = lost or isinstance(exc, errors.Overloaded)
        if (lost and not self._idempotent) or (self._was_sent and not self._may_send_again()):
            return False
        # Without its traceback: that refers to the message, and by way of the caller's frame to this search.
        self.failure = exc.with_traceback(None)
        self.tried = (*self.tried, target)
        return True

    def _may_send_again(self) -> bool:
        self._retries += 1
        return (
            self._retry is not None
            and self._retries < self._retry.attempts
            and seconds_until(self.deadline) != 0.0
            and self._budget.spend()
        )

    def next_round(self) -> float:
        """All have been tried: return how long to pause, in seconds, before that begins again, or raise."""
        assert self.failure is not None
        now = time.monotonic()
        if self._was_sent and self._retry is not None:
            pause, until = self._retry.pause(self._retries), self.deadline
        else:
            # A server that is being restarted is back in a moment.
            self._until = self._until or now + self._patience
            until = self._until if self.deadline is None else min(self._until, self.deadline)
            pause, self._pause = self._pause, min(2 * self._pause, _PAUSE_MAX)
        if until is not None and now + pause > until:
            failure, self.failure = self.failure, None
            try:
                raise failure
            finally:
                del failure  # its traceback refers to this frame
        self.tried = ()
        return pause
