"""Hedged calls: if one member takes long, ask a second one too; the first answer wins, the other call is cancelled.

An answer is what the method returned or raised, or that the member does not have it or takes no such arguments. All
else only ends the one of the two calls that it has happened to: the other may still be answered.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from zmqcore import errors
from zmqcore._pending import Pending
from zmqcore._pool import ChannelPool
from zmqcore.codec import Codec
from zmqcore.rpc import faults
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.deadline import check_time
from zmqcore.rpc.route import Message, NotYet

__all__ = ["Attempt", "answer_in_time", "first_answer", "first_answer_async"]

Future = concurrent.futures.Future[Any]
Coro = Coroutine[Any, Any, Any]


def answer_in_time(
    target: Target,
    pool: ChannelPool,
    codec: Codec,
    request: Message,
    deadline: float | None,
    seconds: float,
) -> Any:
    """Ask ``target`` and return its answer, if that takes no longer than ``seconds``; else raise NotYet.

    Who calls drives the channel, as in any other call. Nothing is sent where that would have to wait.
    """
    channel = pool.acquire_open(target.endpoint)
    if channel is None:
        raise NotYet
    try:
        if channel.peer_instance is None:
            raise NotYet  # it has not said how much it takes
        try:
            pending = channel.submit_nowait(*request, check_time(deadline), None)
        except (errors.Unreachable, errors.Overloaded):
            raise NotYet from None
        try:
            ended = pending.wait(seconds)
        except BaseException:
            pending.close()
            raise
    finally:
        pool.release(channel)
    if not ended:
        raise NotYet(pending)
    return faults.outcome(pending.envelope(), codec, target.endpoint)


class Attempt(Future):
    """One of the two calls of a hedged one: at any time it can be given up.

    A thread of its own does ``work(attempt)``, whose result is that of this future.

    ``begun``: what has been sent to the first member already. ``sent``: whether anything has been sent.
    """

    def __init__(
        self,
        work: Callable[[Attempt], Any],
        pool: ChannelPool,
        codec: Codec,
        request: Message,
        begun: Pending | None = None,
    ) -> None:
        super().__init__()
        self._work = work
        self._pool = pool
        self._codec = codec
        self._request = request
        self._begun = self._pending = begun
        self._given_up = threading.Event()
        self.sent = begun is not None

    def start(self) -> None:
        try:
            threading.Thread(target=self._run, name="zmqcore-hedge", daemon=True).start()
        except RuntimeError:
            self._run()  # no thread can be started now

    def _run(self) -> None:
        try:
            result = self._work(self)
        except BaseException as exc:  # noqa: BLE001 - handed to who waits
            self.cancel()
            # Without its traceback: that refers to this attempt.
            self.set_exception(exc.with_traceback(None))
        else:
            self.set_result(result)

    def ask(self, target: Target, timeout: float | None) -> Any:
        """Return what ``target`` answers, or raise it. Raises Closed if the attempt is given up."""
        pending, self._begun = self._begun, None
        held = self._pool.acquire_open(target.endpoint)  # so that it is not evicted meanwhile
        try:
            if pending is None:
                self.pause(0.0)
                pending = self._pool.submit(target.endpoint, *self._request, None, timeout)
                self._pending = pending
                self.sent = True
                if self._given_up.is_set():
                    pending.close()  # cancel() may not have seen it
            return faults.outcome(pending.envelope(), self._codec, target.endpoint)
        finally:
            if held is not None:
                self._pool.release(held)

    def pause(self, seconds: float) -> None:
        """Pause. Raises Closed if the attempt is given up."""
        if self._given_up.wait(seconds):
            raise errors.Closed("another member has answered this call")

    def cancel(self) -> bool:
        """Give the call up, and tell the server. A connection that is being made goes to the pool."""
        self._given_up.set()
        pending = self._pending
        if pending is not None:
            pending.close()  # its answer may be a stream
        return True


def first_answer(first: Attempt, hedge_after: float, hedge: Callable[[], Attempt | None]) -> Any:
    """Return the answer of ``first`` or, if it has none within ``hedge_after`` seconds, of who answers first.

    ``hedge()`` makes the second attempt, or returns None if there is to be none. Without any answer what ``first`` has
    raised is raised.
    """
    attempts = [first]
    winner = None
    try:
        first.start()
        concurrent.futures.wait(attempts, hedge_after)
        if not first.done() and (second := hedge()) is not None:
            attempts.append(second)
            del second
            attempts[1].start()
        winner = next(filter(_answered, concurrent.futures.as_completed(attempts)), None)
        return (winner or first).result()
    finally:
        while attempts:
            if attempts[-1] is not winner:  # whose answer may be a stream, which goes on
                attempts[-1].cancel()
            attempts.pop()
        del first, winner  # what is raised refers to this frame


async def first_answer_async(first: Coro, hedge_after: float, hedge: Callable[[], Coro]) -> Any:
    """first_answer() for coroutines. If it is cancelled, so are both calls."""
    tasks = [asyncio.ensure_future(first)]
    try:
        await asyncio.wait(tasks, timeout=hedge_after)
        if not tasks[0].done():
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
    """Whether ``future``, which has ended, has done so by an answer."""
    exc = future.exception()
    return exc is None or isinstance(exc, (errors.RemoteError, errors.NoSuchMethod, errors.BadArguments))
