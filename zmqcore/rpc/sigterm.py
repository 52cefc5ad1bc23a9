"""SIGTERM: the first one asks what serves for ever to stop, and the next one ends the process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["first", "interrupts", "sets"]

#: Of each loop that hears SIGTERM, what is to be set then. Used on the main thread only.
_waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
#: What is to be done before a SIGTERM ends the process. Used on the main thread only.
_first: list[Callable[[], None]] = []


@contextlib.contextmanager
def first(act: Callable[[], None]) -> Iterator[None]:
    """While inside, a SIGTERM that ends the process calls ``act`` first, which may be in the middle of anything.

    Nothing changes but on the main thread, and where the program has no handler of its own.
    """
    if threading.current_thread() is not threading.main_thread() or not _would_end():
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    _first.append(act)
    try:
        yield
    finally:
        _first.remove(act)
        if not _first and signal.getsignal(signal.SIGTERM) is _end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _would_end() -> bool:
    return signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _end)


def _end(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)
    try:
        for act in _first:
            act()
    finally:
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """While inside, SIGTERM raises KeyboardInterrupt, as Ctrl-C does. Nothing changes but on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def sets(asked: asyncio.Event) -> Iterator[None]:
    """While inside, the first SIGTERM sets ``asked``; any number of servers of the running loop may wait for it.

    Nothing changes but on the main thread, and where the program has no handler of its own.
    """
    loop = asyncio.get_running_loop()
    if loop not in _waiting:
        if threading.current_thread() is not threading.main_thread() or not _would_end():
            yield
            return
        loop.add_signal_handler(signal.SIGTERM, _ask, loop)
        _waiting[loop] = []
    waiting = _waiting[loop]
    waiting.append(asked)
    try:
        yield
    finally:
        waiting.remove(asked)
        if not waiting and _waiting.get(loop) is waiting:
            _release(loop)


def _ask(loop: asyncio.AbstractEventLoop) -> None:
    for asked in _release(loop):
        asked.set()


def _release(loop: asyncio.AbstractEventLoop) -> list[asyncio.Event]:
    """From now on SIGTERM ends the process."""
    if not loop.is_closed():
        loop.remove_signal_handler(signal.SIGTERM)
    return _waiting.pop(loop)
