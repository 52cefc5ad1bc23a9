"""At the server: answer a call by what a generator yields, as fast as the caller grants."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

from zmqcore._request import Request
from zmqcore.rpc import deadline

__all__ = ["is_stream", "produce", "produce_async"]

#: Who waits for credit so long, in seconds, asks whether the caller is still there.
_PROBE_AFTER = 1.0
_END = object()

#: Sends one item of a request's answer; returns False if nobody wants it any more.
Send = Callable[[Request, Any], bool]


def is_stream(method: Callable[..., Any]) -> bool:
    """Whether ``method`` is a generator function, asynchronous or not."""
    return any(
        inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        for function in (method, type(method).__call__)
    )


def produce(request: Request, items: Generator[Any, None, Any], send: Send) -> None:
    """Send what ``items`` yields until it ends, or nobody wants any more; then close it.

    The calling thread waits where there is no credit. The deadline that the request came with is for the first item.
    """
    try:
        while request.await_credit():
            item = next(items, _END)
            if item is _END or not send(request, item):
                return
            deadline.current.set(None)
    finally:
        items.close()


async def produce_async(
    request: Request,
    items: AsyncGenerator[Any, None] | Generator[Any, None, Any],
    send: Send,
    sent: Callable[[], None],
) -> None:
    """produce() as a coroutine, for both kinds of generators. ``sent()`` is called after each message."""
    try:
        while await _credit(request, sent):
            item = next(items, _END) if isinstance(items, Generator) else await anext(items, _END)
            if item is _END or not send(request, item):
                return
            sent()
            deadline.current.set(None)
    finally:
        if isinstance(items, Generator):
            items.close()
        else:
            await items.aclose()


async def _credit(request: Request, sent: Callable[[], None]) -> bool:
    """Request.await_credit() without a thread that waits."""
    while not request.credit and not request.cancelled:
        granted = asyncio.Event()
        request.on_credit = granted.set
        try:
            async with asyncio.timeout(_PROBE_AFTER):
                await granted.wait()
        except TimeoutError:
            request.probe()
            sent()
    return not request.cancelled
