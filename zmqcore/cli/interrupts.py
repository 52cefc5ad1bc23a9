"""Signals that interrupt a command only where it can be interrupted."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into one :class:`Interrupted`, raised only where that is allowed.

    Context manager, for the main thread only. Outside :meth:`allowed` a signal is remembered, so that what
    creates or removes processes and files is never cut in two; the next :meth:`allowed` or :meth:`check`
    raises it. Everything outside is bounded in time. Signals after the first change nothing.
    """

    def __init__(self) -> None:
        self._allowed = False
        self._number: int | None = None
        self._raised = False
        self._before: dict[int, Any] = {}

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._number is None:
            self._number = number
        if self._allowed:
            self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal has come and that has not been raised yet."""
        if self._number is not None and not self._raised:
            self._raised = True
            raise Interrupted(self._number)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let signals interrupt the block. Sections do not nest."""
        self._allowed = True
        try:
            self.check()
            yield
        finally:
            self._allowed = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
