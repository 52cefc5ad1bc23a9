"""Work that an event loop hands to a thread, and work that a thread hands to an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["in_thread", "on_loop"]

#: How often to look whether a loop that should do something has been closed, in seconds.
_CLOSED_INTERVAL = 0.02

T = TypeVar("T")


def in_thread(
    function: Callable[..., T], *args: Any, unwanted: Callable[[T], object] | None = None
) -> asyncio.Future[T]:
    """Return a future, of the running loop, of what ``function(*args)`` returns on a thread of its own.

    Not the loop's default executor: that belongs to the user, whose own work may occupy it for long. ``unwanted`` is
    called with a result that comes after the future has been cancelled or the loop closed.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, exc: BaseException | None) -> None:
        if future.done():
            drop(result, exc)
        elif exc is not None:
            future.set_exception(exc)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def drop(result: T | None, exc: BaseException | None) -> None:
        if exc is None and unwanted is not None:
            unwanted(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = function(*args)
        except BaseException as exc:  # noqa: BLE001 - handed to who waits
            error = exc
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:  # the loop has been closed
            drop(result, error)

    threading.Thread(target=run, name="zmqcore-aside", daemon=True).start()
    return future


def on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], object], timeout: float) -> bool:
    """Have ``function()`` called by ``loop``, which another thread runs, and wait for that; return whether it was.

    If the loop does not run, or is closed before its turn, it is called here.
    """
    called = threading.Event()
    claim = threading.Lock()

    def call() -> None:
        if claim.acquire(blocking=False):
            try:
                function()
            finally:
                called.set()

    idle = 0
    until = time.monotonic() + timeout
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # closed
        call()
    while not called.wait(_CLOSED_INTERVAL):
        # asyncio.run() runs its loop several times, with gaps.
        idle = 0 if loop.is_running() else idle + 1
        if idle > 5 or loop.is_closed():
            call()
        elif time.monotonic() >= until:
            return False
    return True
