"""Call, cast, fan out to and gather from the servers of a topic."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self

from zmqcore import errors
from zmqcore._channel import Pending
from zmqcore.matchmaker import Member
from zmqcore.node import Node, default_node
from zmqcore.rpc import deadline as deadlines
from zmqcore.rpc import faults
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.future import CallFuture
from zmqcore.rpc.results import Fanout, Gathered
from zmqcore.rpc.route import Route, time_left
from zmqcore.topic import Topic

__all__ = ["Client"]

_UNSET: Any = object()
_inherited = deadlines.current.get


def check_options(timeout: float | None, delivery: str) -> None:
    """Raise ValueError for what no client can do."""
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout!r} s; it must be above 0, or None for no limit")
    if delivery != "sent":
        raise ValueError(f"delivery is {delivery!r}; 'sent' is what there is")


class Client:
    """Talk to the servers of ``topic``.

    ``timeout``: how long, in seconds, an operation may take in all; None for ever. ``connect``: endpoints of servers,
    one or several, instead of asking the node's matchmaker. ``discovery_timeout``: how long to wait for a first
    member to appear before NoSuchTopic. ``delivery="sent"``: a cast is at most once, handed to a live connection or
    an error says why not.

    Thread-safe, and cheap: sockets belong to the node's pool. Works in a forked child too. A large buffer among the
    arguments is not copied: do not change it before a call has returned, or a cast's message has left.

    Every operation raises, besides what its docstring says: DeadlineExceeded, Unreachable, PeerLost, NoSuchTopic,
    Overloaded, PoolExhausted, BadArguments, PayloadTooLarge, Closed.
    """

    def __init__(
        self,
        topic: str | Topic,
        *,
        node: Node | None = None,
        timeout: float | None = 5.0,
        delivery: Literal["sent"] = "sent",
        connect: str | Sequence[str] | None = None,
        discovery_timeout: float = 1.0,
    ) -> None:
        check_options(timeout, delivery)
        self._node = node if node is not None else default_node()
        self.topic = Topic.of(topic)
        self.timeout = timeout
        self.delivery = delivery
        self.discovery_timeout = discovery_timeout
        if isinstance(connect, str):
            connect = (connect,)
        self._connect = None if connect is None else tuple(connect)
        self._route = Route(self._node, self.topic, self._connect, discovery_timeout)
        self._pool = self._node.pool
        self._wire = self.topic.wire
        self._codec = self._node.codec
        self._codec_id = self._codec.id
        self._closed = False

    # -- operations ------------------------------------------------------------------------------------------

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run ``method`` on one server and return its result.

        What the handler raises is raised here as RemoteError, with the remote traceback. NoSuchMethod and BadArguments
        say what the server did not like.
        """
        buffers: list[Any] = []
        body = self._codec.encode((args, kwargs), buffers)
        started = time.monotonic()
        request = (self._wire, method, body, buffers or None, b"", self._codec_id)
        target = self._route.only()
        if target is not None and _inherited() is None:
            # Most calls go this way: nothing to choose, no lock to take.
            try:
                envelope = self._pool.call(target.endpoint, *request, self.timeout)
                return faults.outcome(envelope, self._codec, target.endpoint)
            except errors.Unreachable:
                pass
            except errors.PeerLost as exc:
                if exc.executed_possible:
                    raise
        envelope, target = self._route.place(
            self._pool.call, request, deadlines.tighten(self.timeout, started)
        )
        self._route.done(target)
        return faults.outcome(envelope, self._codec, target.endpoint)

    def cast(self, method: str, /, *args: Any, **kwargs: Any) -> None:
        """Have ``method`` run on one server; return once the message has been handed to a live connection.

        At most once. What becomes of it afterwards nobody tells. The timeout bounds the handing over; the message
        itself does not expire.
        """
        buffers: list[Any] = []
        body = self._codec.encode((args, kwargs), buffers)
        started = time.monotonic()
        request = ("cast", self._wire, method, body, buffers or None, b"", self._codec_id)
        target = self._route.only()
        if target is not None and _inherited() is None:
            try:
                self._pool.send(target.endpoint, *request, self.timeout)
                return
            except (errors.Unreachable, errors.PeerLost):
                pass  # certainly not executed: whatever the reason, it has not left
        _, target = self._route.place(self._pool.send, request, deadlines.tighten(self.timeout, started))
        self._route.done(target)

    def fanout(self, method: str, /, *args: Any, **kwargs: Any) -> Fanout:
        """Have ``method`` run on every member that the topic has now; return who has been sent it and who not.

        At most once each. Raises NoSuchTopic if there is no member at all.
        """
        deadline = deadlines.tighten(self.timeout)
        buffers: list[Any] = []
        body = self._codec.encode((args, kwargs), buffers)
        request = (self._wire, method, body, buffers or None, b"", self._codec_id)
        membership = self._route.members(deadline)
        sent: list[Member] = []
        failed: dict[Member, Exception] = {}
        for target in self._route.targets(membership):
            try:
                self._pool.send(target.endpoint, "fanout", *request, time_left(deadline))
            except errors.ZmqcoreError as exc:
                failed[target.member] = exc
            else:
                sent.append(target.member)
        return Fanout(membership.epoch, tuple(sent), failed)

    def gather(self, method: str, /, *args: Any, **kwargs: Any) -> Gathered:
        """Call ``method`` on every member that the topic has now, all at once; return each one's result or error.

        Returns when all have answered, at the latest when the timeout is over. Raises NoSuchTopic if there is no
        member at all.
        """
        deadline = deadlines.tighten(self.timeout)
        buffers: list[Any] = []
        body = self._codec.encode((args, kwargs), buffers)
        request = (self._wire, method, body, buffers or None, b"", self._codec_id, _nobody)
        membership = self._route.members(deadline)
        gathered = Gathered(membership.epoch)
        started: list[tuple[Target, Pending]] = []
        try:
            for target in self._route.targets(membership):
                try:
                    pending = self._pool.submit(target.endpoint, *request, time_left(deadline))
                except errors.ZmqcoreError as exc:
                    gathered.missing[target.member] = exc
                else:
                    started.append((target, pending))
            for target, pending in started:
                try:
                    envelope = pending.envelope()
                except errors.ZmqcoreError as exc:
                    gathered.missing[target.member] = exc
                    continue
                try:
                    gathered.results[target.member] = faults.outcome(envelope, self._codec, target.endpoint)
                except errors.ZmqcoreError as exc:
                    gathered.errors[target.member] = exc
        finally:
            for _, pending in started:
                pending.cancel()
        return gathered

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Start a call and return a future of its result at once.

        Waiting in ``result()`` drives the call as call() would. Cancelling the future gives the call up. What keeps
        the request from being sent is raised here.
        """
        buffers: list[Any] = []
        body = self._codec.encode((args, kwargs), buffers)
        future = CallFuture(self._route, self._codec)
        request = (self._wire, method, body, buffers or None, b"", self._codec_id, future.settle)
        pending, target = self._route.place(self._pool.submit, request, deadlines.tighten(self.timeout))
        future.sent(pending, target)
        return future

    # -- the client itself -----------------------------------------------------------------------------------

    def members(self) -> tuple[Member, ...]:
        """Return the members that the topic has now, as far as is known; possibly none."""
        return self._route.known().members

    def prepare(
        self,
        *,
        server: str | None = _UNSET,
        timeout: float | None = _UNSET,
        delivery: Literal["sent"] = _UNSET,
        discovery_timeout: float = _UNSET,
    ) -> Client:
        """Return a client like this one but for what is given: e.g. only the server of that name."""
        topic = self.topic if server is _UNSET else Topic(self.topic.name, server, self.topic.exchange)
        return Client(
            topic,
            node=self._node,
            timeout=self.timeout if timeout is _UNSET else timeout,
            delivery=self.delivery if delivery is _UNSET else delivery,
            connect=self._connect,
            discovery_timeout=self.discovery_timeout if discovery_timeout is _UNSET else discovery_timeout,
        )

    def close(self) -> None:
        """Stop watching the topic's membership. Sockets stay in the node's pool. Twice is fine."""
        self._closed = True
        self._route.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = ", ".join(self._connect) if self._connect else self._node.matchmaker.url
        return f"<Client {self.topic} by {where}{' closed' if self._closed else ''}>"


def _nobody(_: Pending) -> None:
    """Gather waits for its requests itself."""
