"""Call, cast, fan out to and gather from the servers of a topic."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from zmqcore import errors
from zmqcore._pending import Pending
from zmqcore._retention import Lane
from zmqcore.matchmaker import Member, Membership
from zmqcore.redelivery import wait_until_finished
from zmqcore.rpc import deadline as deadlines
from zmqcore.rpc import faults
from zmqcore.rpc.accepted import check_finished
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.base_client import BaseClient
from zmqcore.rpc.future import CallFuture
from zmqcore.rpc.hedging import Attempt, answer_in_time, first_answer
from zmqcore.rpc.results import Fanout, Gathered
from zmqcore.rpc.retry import Retryable, Search
from zmqcore.rpc.route import Message, NotYet

__all__ = ["Client"]

_inherited = deadlines.current.get
#: How many connections fanout and gather open at a time.
_CONNECTORS = 32

T = TypeVar("T")


class Client(BaseClient):
    """Talk to the servers of ``topic``.

    ``timeout``: how long, in seconds, an operation may take in all; None for ever. ``connect``: endpoints of servers,
    one or several, instead of asking the node's matchmaker. ``discovery_timeout``: how long to wait for a first
    member to appear before NoSuchTopic. ``delivery="sent"``: a cast is at most once, handed to a live connection or
    an error says why not; ``"accepted"``: at least once, see cast(). ``metadata``: what accompanies every message of
    this client, a mapping with text as keys; a handler reads it by ``zmqcore.metadata()``. ``interceptors``: called
    around each operation, the first outermost; see :class:`Operation`.

    Thread-safe, and cheap: sockets belong to the node's pool. Works in a forked child too. A large buffer among the
    arguments is not copied: do not change it before a call has returned, a cast's message has left,
    or what was accepted is finished; nor at all with ``hedge_after``, as it may be on its way to a second member.

    Every operation raises, besides what its docstring says: DeadlineExceeded, Unreachable, PeerLost, NoSuchTopic,
    Overloaded, PoolExhausted, BadArguments, PayloadTooLarge, Closed.
    """

    # -- operations ------------------------------------------------------------------------------------------

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run ``method`` on one server and return its result.

        What the handler raises is raised here as RemoteError, with the remote traceback. NoSuchMethod and BadArguments
        say what the server did not like.
        """
        if self.interceptors:
            return self._intercept("call", method, args, kwargs)
        buffers: list[Any] = []
        encode = self._encode
        body = encode((args, kwargs), buffers)
        started = time.monotonic()
        request = (self._wire, method, body, buffers or None, self._metadata, self._codec_id)
        if self._budget.short:
            self._earn()
        target = self._route.only()
        if target is not None and _inherited() is None:
            # Most calls go this way: nothing to choose, no lock to take, nobody else to ask.
            try:
                return self._call(target, *request, self.timeout)
            except Retryable as exc:
                search = self._search(deadlines.tighten(self.timeout, started))
                if not search.goes_on(target, exc):
                    raise
        else:
            search = self._search(deadlines.tighten(self.timeout, started))
        if self.hedge_after is not None:
            return self._call_hedged(request, search, self.hedge_after)
        result, target = self._place(self._call, request, search)
        self._route.done(target)
        return result

    def _place(
        self, operate: Callable[..., T], arguments: tuple[Any, ...], search: Search
    ) -> tuple[T, Target]:
        return self._route.place(operate, arguments, search, self.discovery_timeout)

    def _call(self, target: Target, *request: Any) -> Any:
        endpoint = target.endpoint
        return faults.outcome(self._pool.call(endpoint, *request), self._codec, endpoint)

    def _send(self, target: Target, *request: Any) -> None:
        if self.delivery == "sent":
            self._pool.send(target.endpoint, *request)
        else:
            self._pool.send_accepted(self._route.lanes(target.endpoint), *request)

    def _send_on(self, lanes: dict[str, Lane], endpoint: str, *request: Any) -> int:
        return self._pool.send_accepted(lanes[endpoint], *request)

    def cast(self, method: str, /, *args: Any, **kwargs: Any) -> None:
        """Have ``method`` run on one server; return once the message has been handed to a live connection.

        At most once, and what becomes of it afterwards nobody tells; but with ``delivery="accepted"`` at least once: it
        is kept, and sent again if need be, until a server has run it, see flush(). The timeout bounds the handing over;
        the message itself does not expire. An error means that it was not accepted.
        """
        if self.interceptors:
            self._intercept("cast", method, args, kwargs)
            return
        buffers: list[Any] = []
        encode = self._encode
        body = encode((args, kwargs), buffers)
        target = self._route.only()
        send_now = self._send_now
        if (
            target is not None
            and _inherited() is None
            and send_now(
                target.endpoint,
                "cast",
                self._wire,
                method,
                body,
                buffers or None,
                self._metadata,
                self._codec_id,
                self._lanes,
            )
        ):
            return  # most casts go this way: nothing to choose, nothing to wait for
        request = ("cast", self._wire, method, body, buffers or None, self._metadata, self._codec_id)
        _, target = self._place(self._send, request, self._search(deadlines.tighten(self.timeout)))
        self._route.done(target)

    def fanout(self, method: str, /, *args: Any, **kwargs: Any) -> Fanout:
        """Have ``method`` run on every member that the topic has now; return who has been sent it and who not.

        At most once each. With ``delivery="accepted"`` it waits until they have run it, and says who has and of whom
        that is not known when the timeout is over. Raises NoSuchTopic if there is no member at all.
        """
        if self.interceptors:
            around: Fanout = self._intercept("fanout", method, args, kwargs)
            return around
        deadline = deadlines.tighten(self.timeout)
        buffers: list[Any] = []
        encode = self._encode
        body = encode((args, kwargs), buffers)
        request = ("fanout", self._wire, method, body, buffers or None, self._metadata, self._codec_id)
        membership = self._route.members(self.discovery_timeout, deadline)
        lanes: dict[str, Lane] = {}
        send: Callable[..., int] = self._pool.send
        if self.delivery == "accepted":
            lanes = self._lanes_for(membership, deadline)
            send = partial(self._send_on, lanes)
        sent: list[Target] = []
        failed: dict[Member, Exception] = {}
        for target, outcome in self._to_all(membership, send, request, deadline):
            if isinstance(outcome, Exception):
                failed[target.member] = outcome
            else:
                sent.append(target)
        if not lanes:
            return Fanout(membership.epoch, tuple(target.member for target in sent), failed)
        wait_until_finished(lambda: [lanes[target.endpoint] for target in sent], deadline)
        return self._accepted_fanout(membership, sent, failed, lanes)

    def gather(self, method: str, /, *args: Any, **kwargs: Any) -> Gathered:
        """Call ``method`` on every member that the topic has now, all at once; return each one's result or error.

        Returns when all have answered, at the latest when the timeout is over. Raises NoSuchTopic if there is no
        member at all.
        """
        if self.interceptors:
            around: Gathered = self._intercept("gather", method, args, kwargs)
            return around
        deadline = deadlines.tighten(self.timeout)
        buffers: list[Any] = []
        encode = self._encode
        body = encode((args, kwargs), buffers)
        request = (self._wire, method, body, buffers or None, self._metadata, self._codec_id, None)
        membership = self._route.members(self.discovery_timeout, deadline)
        gathered = Gathered(membership.epoch)
        started: list[tuple[Target, Pending]] = []
        try:
            for target, outcome in self._to_all(membership, self._pool.submit, request, deadline):
                if isinstance(outcome, Exception):
                    gathered.missing[target.member] = outcome
                else:
                    started.append((target, outcome))
            for target, pending in started:
                try:
                    envelope = pending.envelope()
                except errors.ZmqcoreError as exc:
                    gathered.missing[target.member] = exc.with_traceback(None)
                    continue
                try:
                    gathered.results[target.member] = faults.outcome(envelope, self._codec, target.endpoint)
                except errors.ZmqcoreError as exc:
                    gathered.errors[target.member] = exc.with_traceback(None)  # which refers to ``gathered``
        finally:
            for _, pending in started:
                pending.cancel()
        return gathered

    def _to_all(
        self,
        membership: Membership,
        operate: Callable[..., T],
        arguments: tuple[Any, ...],
        deadline: float | None,
    ) -> Iterator[tuple[Target, T | errors.ZmqcoreError]]:
        """Do ``operate(endpoint, *arguments, timeout)`` for every member; yield each one's result or error.

        Members to whom a connection is open come first. The others are connected by a few threads meanwhile, so that
        one that cannot be reached does not use up the time of those behind it.
        """

        def attempt(target: Target) -> T | errors.ZmqcoreError:
            try:
                return operate(target.endpoint, *arguments, deadlines.check_time(deadline))
            except (errors.PayloadTooLarge, errors.BadArguments, errors.Closed):
                raise  # the same for everybody
            except errors.ZmqcoreError as exc:
                return exc.with_traceback(None)  # which refers to the message

        cold: list[Target] = []
        for target in self._route.targets(membership):
            channel = self._pool.acquire_open(target.endpoint)
            if channel is None:
                cold.append(target)
                continue
            self._pool.release(channel)
            yield target, attempt(target)
        if len(cold) == 1:
            yield cold[0], attempt(cold[0])
        elif cold:
            with concurrent.futures.ThreadPoolExecutor(
                min(_CONNECTORS, len(cold)), "zmqcore-connect"
            ) as threads:
                yield from zip(cold, threads.map(attempt, cold), strict=True)

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Start a call and return a future of its result at once.

        Waiting in ``result()`` drives the call as call() would. Cancelling the future gives the call up, and tells the
        server. What keeps the request from being sent is raised here, after other members have been tried. Once it has
        been sent the future ends with what becomes of it: ``retry`` and ``hedge_after`` are for call(), which a thread
        of your own can make.
        """
        if self.interceptors:
            around: concurrent.futures.Future[Any] = self._intercept("submit", method, args, kwargs)
            return around
        buffers: list[Any] = []
        encode = self._encode
        body = encode((args, kwargs), buffers)
        started = time.monotonic()
        wire, codec, metadata, out_of_band = self._wire, self._codec_id, self._metadata, buffers or None
        target = self._route.only()
        if target is not None and _inherited() is None:
            endpoint = target.endpoint
            try:
                pending = self._pool.submit(
                    endpoint, wire, method, body, out_of_band, metadata, codec, None, self.timeout
                )
                return CallFuture(self._codec, pending, endpoint)
            except (errors.Unreachable, errors.PeerLost):
                pass  # it has not left
        request = (wire, method, body, out_of_band, metadata, codec)
        future = CallFuture(self._codec)
        self._place(self._submit, (future, request), self._search(deadlines.tighten(self.timeout, started)))
        return future

    def _submit(self, target: Target, future: CallFuture, request: Message, timeout: float | None) -> None:
        settle = future.counted(self._route, target).settle
        pending = self._pool.submit(target.endpoint, *request, settle, timeout, hurry=False)
        future.sent(pending, target.endpoint)

    def _call_hedged(self, request: Message, search: Search, hedge_after: float) -> Any:
        """call(), but another member is asked too if there is no answer after ``hedge_after`` seconds.

        Most calls are answered by then, by a member to whom a connection is open: they need no other thread.
        """
        hedge_at = time.monotonic() + hedge_after
        route, pool, codec, deadline = self._route, self._pool, self._codec, search.deadline
        begun: Pending | None = None
        target = route.choose(route.known(), search)
        if target is not None:
            try:
                result = route.ask(target, answer_in_time, pool, codec, request, deadline, hedge_after)
                route.done(target)
                return result
            except NotYet as exc:
                begun = exc.pending
            except Retryable as exc:
                if not search.goes_on(target, exc):
                    raise
                target = None

        def call(attempt: Attempt) -> Any:
            result, answered = route.place(
                attempt.ask, (), search, self.discovery_timeout, target, attempt.pause
            )
            route.done(answered)
            return result

        def hedge() -> Attempt | None:
            try:
                other = self._other(search)
            except errors.Closed:
                return None  # this client is; what has begun goes on
            if other is None:
                return None
            return Attempt(partial(self._hedge, other, deadline), pool, codec, request)

        return first_answer(Attempt(call, pool, codec, request, begun), hedge_at - time.monotonic(), hedge)

    def _hedge(self, other: Target, deadline: float | None, attempt: Attempt) -> Any:
        route = self._route
        try:
            result = route.ask(other, route.reach, attempt.ask, (), deadline)
        finally:
            if not attempt.sent:
                self._budget.earn(1.0)
        route.done(other)
        return result

    # -- the client itself -----------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything that was accepted is finished: the methods have run.

        For casts of this client and its variations. ``timeout`` in seconds, None for ever. Raises DeadlineExceeded if
        something is not known to be finished then, which stays accepted, and PeerLost if something has been given up.
        """
        wait_until_finished(self._routes.lanes, None if timeout is None else time.monotonic() + timeout)
        check_finished(self._routes.lanes())

    def close(self, timeout: float = 5.0) -> None:
        """Wait up to ``timeout`` seconds for what was accepted, and stop watching the topic's membership.

        What is not finished by then may still be, but is not sent again if it is lost; the log says how much that is.
        Sockets stay in the node's pool. Twice is fine.
        """
        self._routes.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
