"""The client for asyncio programs."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeGuard, TypeVar

from zmqcore import errors
from zmqcore._retention import Lane
from zmqcore.matchmaker import Member, Membership
from zmqcore.redelivery import is_finished
from zmqcore.rpc import deadline as deadlines
from zmqcore.rpc import faults
from zmqcore.rpc.accepted import check_finished
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.base_client import BaseClient
from zmqcore.rpc.handover import in_thread
from zmqcore.rpc.hedging import first_answer_async
from zmqcore.rpc.loop import LoopChannels, channels_of_running_loop
from zmqcore.rpc.results import Fanout, Gathered
from zmqcore.rpc.retry import Retryable, Search
from zmqcore.rpc.route import Message

__all__ = ["AsyncClient"]

#: How often to look for a first member, in seconds.
_DISCOVERY_INTERVAL = 0.02

#: Between two looks whether all is finished: the first pause and the longest one, in seconds.
_FIRST_LOOK, _LONGEST_LOOK = 0.0005, 0.02

T = TypeVar("T")


class AsyncClient(BaseClient):
    """Talk to the servers of ``topic`` from coroutines. Options, methods and errors are those of :class:`Client`.

    The event loop drives the channels: there is no thread and no task per call. One client can be used by several loops
    in several threads. Cancelling a call tells the server, which cancels the coroutine that it runs.
    """

    #: The channels of the loop that has used the client last: mostly there is only that one.
    _last_channels: weakref.ref[LoopChannels] | None = None

    # -- operations ------------------------------------------------------------------------------------------

    async def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run ``method`` on one server and return its result; see :meth:`Client.call`."""
        if self.interceptors:
            return await self._intercept("call", method, args, kwargs)
        deadline, request = self._prepare(method, args, kwargs)
        channels = self._channels()
        if self._budget.short:
            self._earn()
        target = self._route.only()
        if target is not None:
            try:
                endpoint = target.endpoint
                reply = channels.ask(endpoint, request, deadline)
                if reply is None:
                    envelope = await channels.call(endpoint, request, deadline)
                else:
                    await reply
                    envelope = reply.envelope()
                return faults.outcome(envelope, self._codec, endpoint, channels.stream)
            except Retryable as exc:
                search = self._search(deadline)
                if not search.goes_on(target, exc):
                    raise
        else:
            search = self._search(deadline)
        if self.hedge_after is not None:
            return await self._call_hedged(channels, request, search, self.hedge_after)
        return await self._place(channels, partial(self._call, channels, request, deadline), search)

    async def _call(
        self, channels: LoopChannels, request: Message, deadline: float | None, target: Target
    ) -> Any:
        envelope = await channels.call(target.endpoint, request, deadline)
        return faults.outcome(envelope, self._codec, target.endpoint, channels.stream)

    async def cast(self, method: str, /, *args: Any, **kwargs: Any) -> None:
        """Have ``method`` run on one server; see :meth:`Client.cast`."""
        if self.interceptors:
            await self._intercept("cast", method, args, kwargs)
            return
        deadline, request = self._prepare(method, args, kwargs)
        channels = self._channels()
        accepts, lanes = self.delivery == "accepted", self._route.lanes

        def send(target: Target) -> Awaitable[None]:
            lane = lanes(target.endpoint) if accepts else None
            return channels.send(target.endpoint, "cast", request, deadline, lane)

        await self._place(channels, send, self._search(deadline))

    async def fanout(self, method: str, /, *args: Any, **kwargs: Any) -> Fanout:
        """Have ``method`` run on every member; see :meth:`Client.fanout`."""
        if self.interceptors:
            around: Fanout = await self._intercept("fanout", method, args, kwargs)
            return around
        deadline, request = self._prepare(method, args, kwargs)
        channels = self._channels()
        membership = await self._members(deadline)
        targets = self._route.targets(membership)
        lanes = self._lanes_for(membership, deadline) if self.delivery == "accepted" else {}
        outcomes = await asyncio.gather(
            *(
                channels.send(target.endpoint, "fanout", request, deadline, lanes.get(target.endpoint))
                for target in targets
            ),
            return_exceptions=True,
        )
        sent: list[Target] = []
        failed: dict[Member, Exception] = {}
        for target, outcome in zip(targets, outcomes, strict=True):
            if outcome is None:
                sent.append(target)
            elif _is_its_own(outcome):
                failed[target.member] = outcome
            else:
                raise outcome
        if not lanes:
            return Fanout(membership.epoch, tuple(target.member for target in sent), failed)
        await _until_finished(lambda: [lanes[target.endpoint] for target in sent], deadline)
        return self._accepted_fanout(membership, sent, failed, lanes)

    async def gather(self, method: str, /, *args: Any, **kwargs: Any) -> Gathered:
        """Call ``method`` on every member, all at once; see :meth:`Client.gather`."""
        if self.interceptors:
            around: Gathered = await self._intercept("gather", method, args, kwargs)
            return around
        deadline, request = self._prepare(method, args, kwargs)
        channels = self._channels()
        membership = await self._members(deadline)
        targets = self._route.targets(membership)
        outcomes = await asyncio.gather(
            *(channels.call(target.endpoint, request, deadline) for target in targets),
            return_exceptions=True,
        )
        gathered = Gathered(membership.epoch)
        for target, outcome in zip(targets, outcomes, strict=True):
            if _is_its_own(outcome):
                gathered.missing[target.member] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                try:
                    gathered.results[target.member] = faults.outcome(
                        outcome, self._codec, target.endpoint, channels.stream
                    )
                except errors.ZmqcoreError as exc:
                    gathered.errors[target.member] = exc.with_traceback(None)  # which refers to ``gathered``
        return gathered

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """Start a call and return a task of its result at once: call() in a task, with its retries and hedges."""
        return asyncio.get_running_loop().create_task(self.call(method, *args, **kwargs))

    # -- the client itself -----------------------------------------------------------------------------------

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until everything that was accepted is finished; see :meth:`Client.flush`."""
        await _until_finished(self._routes.lanes, None if timeout is None else time.monotonic() + timeout)
        check_finished(self._routes.lanes())

    async def close(self, timeout: float = 5.0) -> None:
        """Wait up to ``timeout`` seconds for what was accepted, stop watching the topic's membership, and let go of the
        channels that this loop drives. Twice is fine.

        Calls of other clients on this loop go on: they take up the channels again.
        """
        if not self._routes.closed:
            await _until_finished(self._routes.lanes, time.monotonic() + timeout)
        await in_thread(self._routes.close, 0.0)
        self._channels().release_idle()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- to whom ---------------------------------------------------------------------------------------------

    def _prepare(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[float | None, Message]:
        deadline = deadlines.tighten(self.timeout)
        buffers: list[Any] = []
        body = self._encode((args, kwargs), buffers)
        return deadline, (self._wire, method, body, buffers or None, self._metadata, self._codec_id)

    def _channels(self) -> LoopChannels:
        last = self._last_channels
        channels = None if last is None else last()
        if channels is None or not channels.is_current():
            channels = channels_of_running_loop(self._node)
            self._last_channels = weakref.ref(channels)
        return channels

    async def _known(self) -> Membership:
        """Return the members as far as is known; the first look asks the registry, not on this thread."""
        if self._route.opened:
            return self._route.known()
        return await in_thread(self._route.known)

    async def _members(self, deadline: float | None) -> Membership:
        """Return the members, waiting for a first one if there is none. Raises NoSuchTopic if none appears."""
        until = time.monotonic() + self.discovery_timeout
        if deadline is not None:
            until = min(until, deadline)
        while not (known := await self._known()).members:
            if time.monotonic() >= until:
                raise self._route.no_member(self.discovery_timeout)
            await asyncio.sleep(_DISCOVERY_INTERVAL)
        return known

    async def _place(
        self, channels: LoopChannels, operate: Callable[[Target], Awaitable[T]], search: Search
    ) -> T:
        """Do ``operate(target)`` for the member whose turn it is; see :meth:`Route.place`."""
        while True:
            membership = await self._known()
            target = self._route.choose(membership, search)
            if target is not None:
                try:
                    return await self._ask(channels, target, operate, search.deadline)
                except Retryable as exc:
                    if not search.goes_on(target, exc):
                        raise
            elif search.failure is None:
                await self._members(search.deadline)
            else:
                await asyncio.sleep(search.next_round())

    async def _ask(
        self,
        channels: LoopChannels,
        target: Target,
        operate: Callable[[Target], Awaitable[T]],
        deadline: float | None,
    ) -> T:
        """Do ``operate(target)``; how it ends says something about the member, whom choose() has counted a call."""
        try:
            if not channels.drives(target.endpoint) and not self._route.only():
                # There are others to try: spend no more than half of the time that is left on connecting.
                left = deadlines.check_time(deadline)
                await channels.drive(target.endpoint, None if left is None else time.monotonic() + left / 2)
            result = await operate(target)
        except BaseException as exc:
            self._route.failed(target, exc)
            raise
        self._route.answered(target)
        self._route.done(target)
        return result

    async def _call_hedged(
        self, channels: LoopChannels, request: Message, search: Search, hedge_after: float
    ) -> Any:
        """call(), but another member is asked too if the first one has no answer after ``hedge_after`` seconds."""
        ask = partial(self._call, channels, request, search.deadline)

        async def hedge() -> Any:
            other = self._other(search)
            if other is None:
                raise errors.Unreachable(
                    "there is no other member to ask, or the budget for retries is used up"
                )
            sent = False

            def ask_other(target: Target) -> Awaitable[Any]:
                nonlocal sent
                sent = True
                return ask(target)

            try:
                return await self._ask(channels, other, ask_other, search.deadline)
            finally:
                if not sent:
                    self._budget.earn(1.0)

        return await first_answer_async(self._place(channels, ask, search), hedge_after, hedge)


async def _until_finished(lanes: Callable[[], Iterable[Lane]], deadline: float | None) -> None:
    """Wait until all that was accepted on ``lanes()`` is finished, at most until ``deadline``.

    This loop, or another thread, drives the channels meanwhile.
    """
    pause = _FIRST_LOOK
    while not is_finished(lanes):
        left = deadlines.seconds_until(deadline)
        if left == 0.0:
            return
        await asyncio.sleep(pause if left is None else min(pause, left))
        pause = min(2 * pause, _LONGEST_LOOK)


def _is_its_own(outcome: object) -> TypeGuard[errors.ZmqcoreError]:
    """Whether ``outcome`` is an error of one member, and not one that is the same for everybody."""
    return isinstance(outcome, errors.ZmqcoreError) and not isinstance(
        outcome, (errors.PayloadTooLarge, errors.BadArguments, errors.Closed)
    )
