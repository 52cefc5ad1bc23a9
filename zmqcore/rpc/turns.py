"""Coroutines that wait for room: first come, first served, and each one until its deadline."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from zmqcore import errors
from zmqcore._deadlines import Deadlines
from zmqcore._loop import Turn

__all__ = ["Refused", "Turns", "Waiting"]

_NEVER = (1 << 63) - 1


class Waiting(NamedTuple):
    """One who waits: ``turn`` is settled by what ``attempt()`` returns, once it does not raise Overloaded."""

    turn: Turn
    attempt: Callable[[], Any]
    deadline: float | None


class Refused(NamedTuple):
    """What a turn is settled by where ``attempt()`` has not succeeded."""

    make: Callable[[], Exception]
    """Makes the error. Called by the one who has waited: thousands may be refused at one moment."""


class Turns(OrderedDict[int, Waiting]):
    """Those who wait, by number, in the order in which they came. Belongs to the thread of their loop.

    Coming, going and expiring cost O(log n) each, whatever the order of the deadlines.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count(1)
        self._deadlines = Deadlines()

    def join(self, waiting: Waiting) -> int:
        """Have ``waiting`` wait behind all others; return its number. To leave, take it out."""
        number = next(self._numbers)
        self[number] = waiting
        if len(self._deadlines) > 64 + 2 * len(self):
            self._deadlines = Deadlines()  # most have left before
            for known in self:
                self._note(known)
        else:
            self._note(number)
        return number

    def _note(self, number: int) -> None:
        deadline = self[number].deadline
        if deadline is not None:
            self._deadlines.push(min(int(deadline * 1e9), _NEVER), number)

    def serve(self) -> None:
        """Let those go for whom there is room, from the first one on."""
        while self:
            number, waiting = next(iter(self.items()))
            outcome: Any = None
            if not waiting.turn.done():
                try:
                    outcome = waiting.attempt()
                except errors.Overloaded:
                    return
                except Exception as exc:  # noqa: BLE001 - it is raised where it is waited for
                    outcome = Refused(partial(_given, exc))
                waiting.turn.settle(outcome)
            del self[number]

    def expire(self, refused: Refused) -> None:
        """Settle by ``refused`` those whose deadline has come."""
        now = int(time.monotonic() * 1e9)
        while (first := self._deadlines.first) is not None and first[0] <= now:
            self._deadlines.pop()
            waiting = self.pop(first[1], None)
            if waiting is not None and not waiting.turn.done():
                waiting.turn.settle(refused)

    def end(self, refused: Refused) -> None:
        """Settle all of them by ``refused``."""
        for waiting in self.values():
            if not waiting.turn.done():
                waiting.turn.settle(refused)
        self.clear()

    def seconds_left(self) -> float | None:
        """Return how many seconds are left until the next deadline; None if there is none."""
        first = self._deadlines.first
        return None if first is None else max(0.0, first[0] / 1e9 - time.monotonic())


def _given(exc: Exception) -> Exception:
    return exc
