"""Hedged calls: if one member takes long, ask a second one too; the first answer wins, the other call is cancelled."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any

from zmqcore.rpc.retry import Retryable

__all__ = ["first_answer", "first_answer_async"]

Future = concurrent.futures.Future[Any]
Coro = Coroutine[Any, Any, Any]


def first_answer(first: Future, hedge_after: float, hedge: Callable[[], Future | None]) -> Any:
    """Return the result of ``first`` or, if it has no answer within ``hedge_after`` seconds, of who answers first.

    ``hedge()`` starts the second call and returns its future, or None if there is to be none. What was raised by a
    handler is an answer, too; that a member cannot be reached, was lost or is overloaded is none.
    """
    futures = [first]
    winner = None
    try:
        concurrent.futures.wait(futures, hedge_after)
        if not _answered(first) and (second := hedge()) is not None:
            futures.append(second)
        winner = next(filter(_answered, concurrent.futures.as_completed(futures)), None)
        return (winner or first).result()
    finally:
        for future in futures:
            if future is not winner:  # its answer may be a stream, which goes on
                future.cancel()


async def first_answer_async(first: Coro, hedge_after: float, hedge: Callable[[], Coro]) -> Any:
    """first_answer() for coroutines. If it is cancelled, so are both calls."""
    tasks = [asyncio.ensure_future(first)]
    try:
        await asyncio.wait(tasks, timeout=hedge_after)
        if not _answered(tasks[0]):
            tasks.append(asyncio.ensure_future(hedge()))
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in done if _answered(task)]:
                return task.result()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _answered(future: Future | asyncio.Future[Any]) -> bool:
    """Whether ``future`` has ended, by an answer."""
    return future.done() and not isinstance(future.exception(), Retryable)
