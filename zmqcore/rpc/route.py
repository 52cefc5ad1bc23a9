"""Where a client's messages go: who serves the topic, whose turn it is, and who is next if that fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from zmqcore import errors
from zmqcore._pending import Pending
from zmqcore._retention import Lane
from zmqcore.endpoint import Endpoint
from zmqcore.matchmaker import Member, Membership, Watch
from zmqcore.node import Node
from zmqcore.redelivery import wait_until_finished
from zmqcore.rpc.accepted import Lanes, unfinished
from zmqcore.rpc.balancing import Balancer, Target
from zmqcore.rpc.deadline import check_time
from zmqcore.rpc.forked import renew_in_child
from zmqcore.rpc.retry import Retryable, RetryBudget, Search
from zmqcore.topic import Topic

__all__ = ["Message", "NotYet", "Route", "Routes"]

_logger = logging.getLogger("zmqcore.client")

T = TypeVar("T")

#: What a channel sends: topic, method, body, out-of-band buffers, metadata, codec.
Message = tuple[bytes, str, Any, list[Any] | None, bytes, int]


class NotYet(Exception):
    """There is no answer yet. ``pending``: the call that goes on; None if nothing has been sent."""

    def __init__(self, pending: Pending | None = None) -> None:
        super().__init__()
        self.pending = pending


class Route:
    """From one client to the members of ``topic``: those that ``connect`` names, else the matchmaker's.

    Thread-safe. Works in a forked child.
    """

    def __init__(self, node: Node, topic: Topic, connect: Sequence[str] | None) -> None:
        self._node = node
        self._topic = topic
        self._fixed = None if connect is None else _fixed_membership(topic, connect)
        self._balancer = Balancer(node.host)
        self._watch: Watch | None = None
        self._closed = False
        self.lanes = Lanes(node, self._endpoints)
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child: the watch resumes by itself."""
        self._lock = threading.Lock()

    def known(self) -> Membership:
        """Return the members as far as is known, without waiting for any."""
        if self._closed:
            raise errors.Closed(f"the client of {str(self._topic)!r} is closed")
        if self._fixed is not None:
            return self._fixed
        watch = self._watch
        if watch is None:
            with self._lock:
                if self._watch is None:
                    self._watch = self._node.matchmaker.watch(self._topic)
                watch = self._watch
        return watch.current

    def members(self, patience: float, deadline: float | None) -> Membership:
        """Return the members, waiting up to ``patience`` seconds for a first one; without any raise NoSuchTopic."""
        known = self.known()
        if known.members:
            return known
        watch = self._watch
        if deadline is not None:
            patience = min(patience, max(0.0, deadline - time.monotonic()))
        if watch is not None:
            found = watch.wait_for(_has_members, patience)
            if found is not None:
                return found
        raise self.no_member(patience)

    def no_member(self, waited: float) -> errors.NoSuchTopic:
        """Return the error for a topic that has had no member for ``waited`` seconds."""
        return errors.NoSuchTopic(
            f"nobody serves topic {str(self._topic)!r}, says {self._node.matchmaker.url}"
            f" (waited {waited:.3g} s for a first member)"
        )

    @property
    def opened(self) -> bool:
        """Whether known() has been asked before, so that it will not need the registry."""
        return self._fixed is not None or self._watch is not None

    def targets(self, membership: Membership) -> list[Target]:
        """Return how this process reaches each of the members."""
        return self._balancer.targets(membership)

    def _endpoints(self) -> list[str]:
        return [target.endpoint for target in self.targets(self.known())]

    def only(self) -> Target | None:
        """Return the only member there is, if the last look has shown that: then there is nothing to choose."""
        watch = self._watch
        membership, target = self._balancer.only
        return target if membership is (self._fixed if watch is None else watch.current) else None

    def choose(self, membership: Membership, search: Search) -> Target | None:
        """Return the member whose turn it is, counted as having one more call; None if all have been tried."""
        target = self._balancer.choose(membership, search.tried) if membership.members else None
        if target is not None:
            search.target = target
        return target

    def place(
        self,
        operate: Callable[..., T],
        arguments: tuple[Any, ...],
        search: Search,
        discovery_timeout: float,
        target: Target | None = None,
        pause: Callable[[float], object] = time.sleep,
    ) -> tuple[T, Target]:
        """Do ``operate(target, *arguments, timeout)`` for the member whose turn it is; return result and target.

        ``discovery_timeout``: how long to wait for a first member, in seconds. While ``search`` allows it another
        member is tried, or the same one again a little later, after ``pause(seconds)``. The target counts one more
        outstanding call, until done(). ``target``: one that choose() has returned already.
        """
        deadline = search.deadline
        while True:
            if target is None:
                target = self.choose(self.known(), search)
            if target is not None:
                try:
                    return self.ask(target, self.reach, operate, arguments, deadline), target
                except Retryable as exc:
                    if not search.goes_on(target, exc):
                        raise
                target = None
            elif search.failure is None:
                self.members(discovery_timeout, deadline)
            else:
                pause(search.next_round())

    def ask(self, target: Target, operate: Callable[..., T], *arguments: Any) -> T:
        """Do ``operate(target, *arguments)``; how it ends says something about the member, whom choose() has counted.

        If it ends well the target goes on counting, until done().
        """
        try:
            result = operate(target, *arguments)
        except BaseException as exc:
            self.failed(target, exc)
            raise
        self.answered(target)
        return result

    def reach(
        self, target: Target, operate: Callable[..., T], arguments: tuple[Any, ...], deadline: float | None
    ) -> T:
        """Do ``operate(target, *arguments, timeout)`` once there is a connection.

        Where there are others to try: spend no more than half of the time that is left on connecting.
        """
        if self.only() is None:
            self._connect(target, deadline)
        return operate(target, *arguments, check_time(deadline))

    def _connect(self, target: Target, deadline: float | None) -> None:
        pool = self._node.pool
        channel = pool.acquire_open(target.endpoint)
        if channel is None:
            left = check_time(deadline)
            channel = pool.acquire(target.endpoint, None if left is None else left / 2)
        pool.release(channel)

    def done(self, target: Target) -> None:
        """What place() counted has ended."""
        self._balancer.done(target)

    def failed(self, target: Target, exc: BaseException) -> None:
        """What choose() counted has ended, by ``exc``, which may say something about the member."""
        if isinstance(exc, NotYet):
            return  # it has not ended
        if isinstance(exc, errors.Overloaded) or (
            isinstance(exc, errors.PeerLost) and not exc.executed_possible
        ):
            # It takes nothing more now: it is full, or about to stop, which is no failure.
            self._balancer.overloaded(target)
        elif isinstance(exc, (errors.Unreachable, errors.PeerLost)) or (
            # One that had passed before anything was sent to the member says nothing about it.
            isinstance(exc, errors.DeadlineExceeded) and exc.sent
        ):
            self._balancer.failed(target)
        elif isinstance(exc, errors.RemoteError):
            self.answered(target)
        self._balancer.done(target)

    def ended(self, target: Target, pending: Pending) -> None:
        """The submitted call that choose() counted has ended."""
        try:
            if not pending.answered:
                pending.envelope()
        except errors.ZmqcoreError as exc:
            self.failed(target, exc)
        else:
            self.answered(target)
            self._balancer.done(target)

    def other(self, target: Target) -> Target | None:
        """Return another member than ``target``, counted as having one more call; None if there is none."""
        return self._balancer.choose(self.known(), (target,))

    def answered(self, target: Target) -> None:
        """``target`` is well. What choose() counted goes on."""
        if target.failures:
            self._balancer.answered(target)

    def close(self) -> None:
        """Stop watching the topic's membership. Twice is fine."""
        self._closed = True
        self._balancer.only = (None, None)
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()


def _has_members(membership: Membership) -> bool:
    return bool(membership.members)


def _fixed_membership(topic: Topic, connect: Sequence[str]) -> Membership:
    """Return the membership that ``connect=`` stands for: one member per endpoint."""
    if not connect:
        raise errors.InvalidEndpoint("connect is empty; name one endpoint at least")
    members = []
    for text in connect:
        endpoint = str(Endpoint.parse(text))
        name = Topic(topic.name, topic.server or endpoint, topic.exchange)
        members.append(Member(name, (endpoint,), endpoint, "", 0))
    return Membership(0, tuple(members))


class Routes:
    """What a client and its variations share: a route for each topic, and what retries they can afford."""

    def __init__(self, node: Node, connect: Sequence[str] | None) -> None:
        self._node = node
        self._connect = connect
        self._routes: dict[Topic, Route] = {}
        self.budget = RetryBudget()
        self.closed = False

    def get(self, topic: Topic) -> Route:
        """Return the route to ``topic``."""
        route = self._routes.get(topic)
        if route is None:
            if self.closed:
                raise errors.Closed(f"the client of {str(topic)!r} is closed")
            # Of two threads that come here at once, one wins: setdefault is atomic.
            route = self._routes.setdefault(topic, Route(self._node, topic, self._connect))
        return route

    def lanes(self) -> list[Lane]:
        """Return the lanes of all of them."""
        return [lane for route in tuple(self._routes.values()) for lane in route.lanes]

    def close(self, timeout: float) -> None:
        """Close all of them, when all that was accepted is finished or ``timeout`` seconds are over. Twice is fine."""
        if self.closed:
            return
        try:
            wait_until_finished(self.lanes, time.monotonic() + timeout)
        finally:
            if left := unfinished(self.lanes()):
                _logger.warning(
                    "a client is closed, and not everything is finished that was accepted: %s", left
                )
            self.closed = True
            for route in tuple(self._routes.values()):
                route.close()
