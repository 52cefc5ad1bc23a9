"""Where a client's messages go: who serves the topic, whose turn it is, and who is next if that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from zmqcore import errors
from zmqcore.endpoint import Endpoint
from zmqcore.matchmaker import Member, Membership, Watch
from zmqcore.node import Node
from zmqcore.rpc.balancing import Balancer, Target
from zmqcore.topic import Topic

__all__ = ["Route", "time_left"]

#: Between two rounds over members that all refuse a connection: first and longest pause, in seconds.
_PAUSE, _PAUSE_MAX = 0.02, 0.5

T = TypeVar("T")


def time_left(deadline: float | None) -> float | None:
    """Return the seconds until ``deadline``, a time of ``time.monotonic()``; 0 if it has passed."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    return left if left > 0 else 0.0


class Route:
    """From one client to the members of ``topic``: those that ``connect`` names, else the matchmaker's.

    ``discovery_timeout``: how long, in seconds, to wait for a first member. Thread-safe. Works in a forked child.
    """

    def __init__(
        self, node: Node, topic: Topic, connect: Sequence[str] | None, discovery_timeout: float
    ) -> None:
        self._node = node
        self._topic = topic
        self._discovery_timeout = discovery_timeout
        self._fixed = None if connect is None else _fixed_membership(topic, connect)
        self._balancer = Balancer(node.host)
        self._watch: Watch | None = None
        self._lock = threading.Lock()
        self._closed = False

    def known(self) -> Membership:
        """Return the members as far as is known, without waiting for any."""
        if self._fixed is not None:
            return self._fixed
        watch = self._watch
        if watch is None:
            with self._lock:
                if self._closed:
                    raise errors.Closed(f"the client of {str(self._topic)!r} is closed")
                if self._watch is None:
                    self._watch = self._node.matchmaker.watch(self._topic)
                watch = self._watch
        return watch.current

    def members(self, deadline: float | None) -> Membership:
        """Return the members, waiting for a first one if there is none. Raises NoSuchTopic if none appears."""
        known = self.known()
        if known.members:
            return known
        watch = self._watch
        patience = self._discovery_timeout
        if deadline is not None:
            patience = min(patience, max(0.0, deadline - time.monotonic()))
        if watch is not None:
            found = watch.wait_for(_has_members, patience)
            if found is not None:
                return found
        raise errors.NoSuchTopic(
            f"nobody serves topic {str(self._topic)!r}, says {self._node.matchmaker.url}"
            f" (waited {patience:.3g} s for a first member)"
        )

    def targets(self, membership: Membership) -> list[Target]:
        """Return how this process reaches each of the members."""
        return self._balancer.targets(membership)

    def only(self) -> Target | None:
        """Return the only member there is, if the last look has shown that: then there is nothing to choose."""
        membership, target = self._balancer.only
        watch = self._watch
        if membership is not None and membership is (self._fixed if watch is None else watch.current):
            return target
        return None

    def place(
        self, operate: Callable[..., T], arguments: tuple[Any, ...], deadline: float | None
    ) -> tuple[T, Target]:
        """Do ``operate(endpoint, *arguments, timeout)`` for the member whose turn it is; return result and target.

        While it is certain that nothing was executed, another member is tried, or the same one again a little later.
        The target counts one more outstanding call, until done().
        """
        tried: list[Target] = []
        failure: errors.ZmqcoreError | None = None
        give_up = pause = 0.0
        balancer = self._balancer
        while True:
            membership = self.known()
            target = balancer.choose(membership, tried) if membership.members else None
            if target is not None:
                try:
                    return operate(target.endpoint, *arguments, time_left(deadline)), target
                except (errors.Unreachable, errors.PeerLost) as exc:
                    balancer.done(target)
                    if isinstance(exc, errors.PeerLost) and exc.executed_possible:
                        raise
                    failure = exc
                    tried.append(target)
                except BaseException:
                    balancer.done(target)
                    raise
            elif failure is None:
                self.members(deadline)
            else:
                # Everybody has refused. A server that is being restarted is back in a moment.
                now = time.monotonic()
                if not give_up:
                    give_up, pause = now + self._node.connect_timeout, _PAUSE
                if now + pause > give_up or (deadline is not None and now + pause > deadline):
                    raise failure
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_MAX)
                tried.clear()

    def done(self, target: Target) -> None:
        """What place() counted has ended."""
        self._balancer.done(target)

    def close(self) -> None:
        """Stop watching the topic's membership. Twice is fine."""
        self._closed = True
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
