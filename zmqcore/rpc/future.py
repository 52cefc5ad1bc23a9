"""The future of a submitted call."""

from __future__ import annotations

import concurrent.futures
import contextvars
import threading
import time
from typing import Any

from zmqcore._channel import Pending
from zmqcore.codec import Codec
from zmqcore.node import called_back
from zmqcore.rpc import faults
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.route import Route

__all__ = ["CallFuture"]


class CallFuture(concurrent.futures.Future[Any]):
    """The future of one submitted call. Who waits for it drives the call; when nobody does, the node's thread does.

    The reply may come before submit() itself has returned: whichever of sent() and settle() comes second ends it.
    """

    def __init__(self, route: Route, codec: Codec) -> None:
        super().__init__()
        self._route = route
        self._codec = codec
        self._lock = threading.Lock()
        self._pending: Pending | None = None
        self._target: Target | None = None
        self._ended = False

    def sent(self, pending: Pending, target: Target) -> None:
        """The request has left."""
        with self._lock:
            self._pending, self._target = pending, target
            ended = self._ended
        if ended:
            self._end(pending, target)

    def settle(self, pending: Pending) -> None:
        """The channel's callback: the request has ended."""
        with self._lock:
            self._ended = True
            target = self._target
        if target is not None:
            self._end(pending, target)

    def _end(self, pending: Pending, target: Target) -> None:
        # The user's callbacks run on whichever thread drives the channel: what that thread is about (the deadline of
        # a request, say) is none of their business.
        contextvars.Context().run(self._end_apart, pending, target)

    def _end_apart(self, pending: Pending, target: Target) -> None:
        called_back.set(True)
        self._route.done(target)
        if not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(faults.outcome(pending.envelope(), self._codec, target.endpoint))
        except BaseException as exc:  # noqa: BLE001  (whatever it is, it belongs to who waits)
            self.set_exception(exc)

    def _drive(self, timeout: float | None) -> float | None:
        """Wait for the call; return what is left of ``timeout``."""
        pending = self._pending
        if pending is None or self.done():
            return timeout
        if timeout is None:
            pending.wait()
            return None
        until = time.monotonic() + timeout
        pending.wait(timeout)
        return max(0.0, until - time.monotonic())

    def result(self, timeout: float | None = None) -> Any:
        """Return the result, or raise what the call raised; TimeoutError if it has not ended in ``timeout`` s."""
        return super().result(self._drive(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; TimeoutError if it has not ended in ``timeout`` s."""
        return super().exception(self._drive(timeout))

    def cancel(self) -> bool:
        """Give the call up, unless it has ended. Whether the server runs it nobody knows."""
        if not super().cancel():
            return False
        pending, target = self._pending, self._target
        # If cancel() is too late, settle() is on its way and sees that the future was cancelled.
        if pending is not None and target is not None and pending.cancel():
            self._route.done(target)
            self.set_running_or_notify_cancel()
        return True
