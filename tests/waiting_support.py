"""Waiting until something holds, on a thread or on an event loop. Nothing is asserted about time."""

from __future__ import annotations

import asyncio
import inspect
import selectors
import sys
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from zmqcore._socket import waiters

#: Far above what anything takes; this only ends a test that hangs. In seconds.
PATIENCE = 30.0


def until(condition: Callable[[], object], what: str = "") -> None:
    """Return once ``condition()`` holds; fail the test if it does not within PATIENCE."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            pytest.fail(f"has not happened in {PATIENCE:g} s: {what or condition}")
        time.sleep(0.005)


def waiting_threads() -> int:
    """How many threads of this process wait on a channel, and how many ports it has: each holds an eventfd."""
    held = waiters()
    return held["open"] - held["idle"]


def stands_in(thread: threading.Thread | str, function: str) -> bool:
    """Whether the thread (of that name) is in a Python function of that name, and in none that this has called."""
    for each in threading.enumerate():
        if thread in (each, each.name):
            frame = sys._current_frames().get(each.ident or 0)
            return frame is not None and frame.f_code.co_name == function
    return False


class CountingSelector(selectors.DefaultSelector):
    """Counts how often its event loop looks for what is ready: one that spins does it thousands of times a second."""

    looks = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.looks += 1
        return super().select(timeout)


async def eventually(condition: Callable[[], Awaitable[object] | object], what: str = "") -> None:
    """As until(), for a loop, which goes on meanwhile; the condition may be a coroutine function."""
    give_up = time.monotonic() + PATIENCE
    while True:
        holds = condition()
        if inspect.isawaitable(holds):
            holds = await holds
        if holds:
            return
        if time.monotonic() > give_up:
            pytest.fail(f"has not happened in {PATIENCE:g} s: {what or condition}")
        await asyncio.sleep(0.005)


async def assert_idle(selector: CountingSelector) -> None:
    """Fail if the running loop, which is the selector's, has no rest while nothing happens."""
    before = selector.looks
    await asyncio.sleep(0.5)
    assert selector.looks - before < 50, "it spins"
