"""The future of a submitted call."""

from __future__ import annotations

import concurrent.futures
import contextvars
import threading
import time
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from typing import Any

from zmqcore import errors
from zmqcore._pending import Pending
from zmqcore.codec import Codec
from zmqcore.node import called_back
from zmqcore.rpc import faults
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.route import Route

__all__ = ["CallFuture"]

#: Held for a moment while a future becomes a watched one.
_watching = threading.Lock()


class CallFuture(concurrent.futures.Future[Any]):
    """The future of one submitted call. Who waits for it drives the call; when nobody does, the node's thread does.

    Most are asked for their result, once, and nothing else. So it is little more than the channel's Pending at first:
    that decides, under the channel's lock, how the call ends. The reply is decoded by who asks for it. Only when
    somebody wants to be told of the end (callbacks, ``concurrent.futures.wait``), which shows by asking for the
    condition, the future is *watched*: it gets what any Future has, and the channel calls settle().

    Invariants:
      I1. ``_state`` changes once, to what the ended Pending says; it does not matter which thread writes it.
      I2. Waiters and callbacks are added, under the condition, only while ``_state`` is PENDING, and told by _tell()
          after it has changed.
    """

    _counted = False

    def __init__(self, codec: Codec, pending: Pending | None = None, endpoint: str = "") -> None:
        # Not super().__init__(), whose attributes are made when they are needed.
        self._state = PENDING
        self._watched = False
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._target: Target | None = None  # that counts the call; None if nobody does
        self._codec = codec
        if pending is not None:
            self._pending = pending
            self._endpoint = endpoint

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        if not self._watched:
            self._watch()
        return self._changed

    @property
    def _result(self) -> Any:  # type: ignore[override]
        return (self._outcome or self._open())[0]

    @property
    def _exception(self) -> BaseException | None:  # type: ignore[override]
        return (self._outcome or self._open())[1]

    # -- what Client.submit() and the channel use ------------------------------------------------------------

    def counted(self, route: Route, target: Target) -> CallFuture:
        """The call counts as one of ``target``'s: have settle() called in any case. Returns itself."""
        self._route = route
        self._target = target
        self._counted = True
        return self

    def sent(self, pending: Pending, endpoint: str) -> None:
        """The request has left. settle() may have been called before."""
        self._pending = pending
        self._endpoint = endpoint

    def settle(self, pending: Pending) -> None:
        """The channel's callback: the call has ended."""
        target, self._target = self._target, None
        if target is not None:
            self._route.ended(target, pending)
        self._state = CANCELLED_AND_NOTIFIED if pending.cancelled else FINISHED
        if self._watched:
            # The user's callbacks run on whichever thread drives the channel: what that thread is about (the deadline
            # of a request, say) is none of their business.
            contextvars.Context().run(self._tell)

    def _watch(self) -> None:
        with _watching:
            if self._watched:
                return
            self._waiters: list[Any] = []
            self._done_callbacks: list[Any] = []
            self._changed = threading.Condition()
            ended = self._state != PENDING
            self._watched = True
        # Not under the lock: the channel may have others to call back, and does so on this thread.
        if ended or self._pending.notify(self.settle):
            return
        # It ended before it was told of settle(). Another thread may wait for it by now; if settle() is not called
        # in any case, and by cancel() neither, nobody would tell it.
        if not self._counted and not self._pending.cancelled:
            self.settle(self._pending)

    def _look(self) -> None:
        """If the call has ended and nobody is to be told of it, that it has ended shows from now on."""
        pending = self._pending
        if self._state == PENDING and self._target is None and pending.done:
            self._state = CANCELLED_AND_NOTIFIED if pending.cancelled else FINISHED

    def _tell(self) -> None:
        """Wake who waits, and call the callbacks."""
        called_back.set(True)
        if self._state == CANCELLED_AND_NOTIFIED:
            add = "add_cancelled"
        else:
            add = "add_result" if self._exception is None else "add_exception"
        with self._condition:
            for waiter in self._waiters:
                getattr(waiter, add)(self)
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]

    def _open(self) -> tuple[Any, BaseException | None]:
        """Return the result or the exception; of threads that decode it at once all get what the first has made."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = faults.outcome(self._pending.envelope(), self._codec, self._endpoint)
        except errors.ZmqcoreError as exc:
            # Without its traceback: that refers to this future, and would keep it, and what its caller holds, alive.
            error = exc.with_traceback(None)
        except BaseException as exc:  # noqa: BLE001  (whatever it is, it belongs to who waits)
            error = exc
        self._outcome = outcome = self._pending.keep((result, error))
        return outcome

    # -- what a Future is ------------------------------------------------------------------------------------

    def _drive(self, timeout: float | None) -> float | None:
        """Wait for the call; return what is left of ``timeout``."""
        pending = self._pending
        if timeout is None:
            ended = pending.wait()
        else:
            until = time.monotonic() + timeout
            ended = pending.wait(timeout)
            timeout = max(0.0, until - time.monotonic())
        if ended and self._target is None:
            self._state = CANCELLED_AND_NOTIFIED if pending.cancelled else FINISHED
        return timeout

    def done(self) -> bool:
        """Whether the call has ended, or was cancelled."""
        self._look()
        return self._state != PENDING

    def cancelled(self) -> bool:
        """Whether the call was cancelled."""
        return self._pending.cancelled

    def result(self, timeout: float | None = None) -> Any:
        """Return the result, or raise what the call raised; TimeoutError if it has not ended in ``timeout`` s."""
        outcome = self._outcome
        if outcome is None:
            if self._state == PENDING:
                timeout = self._drive(timeout)
            if self._state != FINISHED:
                return super().result(timeout)
            outcome = self._open()
        result, exc = outcome
        if exc is None:
            return result
        try:
            raise exc
        finally:
            del exc, outcome, self  # its traceback refers to this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; TimeoutError if it has not ended in ``timeout`` s."""
        if self._state == PENDING:
            timeout = self._drive(timeout)
        return super().exception(timeout)

    def cancel(self) -> bool:
        """Give the call up, unless it has ended, and tell the server; return whether it is cancelled.

        Whether the server has begun it nobody knows.
        """
        if self._pending.cancel():
            self.settle(self._pending)
        return self._pending.cancelled
