"""Interceptors that log each request of a server and how long it took, for ``zmqcore serve -vv``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from zmqcore.rpc.interception import Interceptor, Operation

__all__ = ["request_log"]

_logger = logging.getLogger("zmqcore.requests")


def request_log(*, coroutines: bool) -> tuple[Interceptor, ...]:
    """Return the interceptor that logs requests, or none if nobody would see that; with ``coroutines`` for a loop."""
    if not _logger.isEnabledFor(logging.DEBUG):
        return ()
    return (_logged_async,) if coroutines else (_logged,)


def _logged(operation: Operation, proceed: Callable[[Operation], Any]) -> Any:
    with _entry(operation):
        return proceed(operation)


async def _logged_async(operation: Operation, proceed: Callable[[Operation], Any]) -> Any:
    with _entry(operation):
        return await proceed(operation)


@contextmanager
def _entry(operation: Operation) -> Generator[None]:
    started = time.perf_counter()
    outcome = "done"
    try:
        yield
    except BaseException as exc:
        outcome = type(exc).__name__
        raise
    finally:
        _logger.debug("%s: %s in %.3g ms", operation.method, outcome, (time.perf_counter() - started) * 1000)
