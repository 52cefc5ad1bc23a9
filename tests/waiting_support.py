"""Waiting until something holds, on a thread or on an event loop. Nothing is asserted about time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

import pytest

#: Far above what anything takes; this only ends a test that hangs. In seconds.
PATIENCE = 30.0


def until(condition: Callable[[], object], what: str = "") -> None:
    """Return once ``condition()`` holds; fail the test if it does not within PATIENCE."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            pytest.fail(f"has not happened in {PATIENCE:g} s: {what or condition}")
        time.sleep(0.005)


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
