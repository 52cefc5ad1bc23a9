"""Call, cast, fan out to and gather from the servers of a topic."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from zmqcore import errors
from zmqcore._channel import Channel, Pending
from zmqcore._frame import Envelope
from zmqcore.endpoint import Endpoint
from zmqcore.matchmaker import Member, Membership, Watch
from zmqcore.node import Node, default_node
from zmqcore.rpc import deadline as deadlines
from zmqcore.rpc import faults
from zmqcore.rpc.balancing import Balancer, Target
from zmqcore.rpc.results import Fanout, Gathered
from zmqcore.topic import Topic

__all__ = ["Client"]

#: Between two rounds over members that all refuse a connection: first and longest pause, in seconds.
_PAUSE, _PAUSE_MAX = 0.02, 0.5

_UNSET: Any = object()
_inherited = deadlines.current.get

T = TypeVar("T")


class Client:
    """Talk to the servers of ``topic``.

    ``timeout``: how long, in seconds, an operation may take in all; None for ever. ``connect``: endpoints of servers,
    one or several, instead of asking the node's matchmaker. ``discovery_timeout``: how long to wait for a first
    member to appear before NoSuchTopic. ``delivery="sent"``: a cast is at most once, handed to a live connection or
    an error says why not.

    Thread-safe, and cheap: sockets belong to the node's pool. Works in a forked child too.

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
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout!r} s; it must be above 0, or None for no limit")
        if delivery != "sent":
            raise ValueError(f"delivery is {delivery!r}; 'sent' is what there is")
        self._node = node if node is not None else default_node()
        self.topic = Topic.of(topic)
        self.timeout = timeout
        self.delivery = delivery
        self.discovery_timeout = discovery_timeout
        self._pool = self._node.pool
        self._wire = self.topic.wire
        self._connect = (
            (connect,) if isinstance(connect, str) else None if connect is None else tuple(connect)
        )
        self._fixed = None if self._connect is None else _fixed_membership(self.topic, self._connect)
        self._balancer = Balancer(self._node.host)
        self._watch: Watch | None = None
        self._watch_lock = threading.Lock()
        self._closed = False
        self._codec_id = self._node.codec.id
        self._encode = self._node.codec.encode
        self._decode = self._node.codec.decode

    # -- operations ------------------------------------------------------------------------------------------

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run ``method`` on one server and return its result.

        What the handler raises is raised here as RemoteError, with the remote traceback. NoSuchMethod and BadArguments
        say what the server did not like.
        """
        buffers: list[Any] = []
        body = self._encode((args, kwargs), buffers)
        wire, codec, timeout = self._wire, self._codec_id, self.timeout
        started = time.monotonic()
        if _inherited() is None and (way := self._shortcut()) is not None:
            try:
                envelope = way[1].call(wire, method, body, buffers or None, b"", codec, timeout)
            except errors.PeerLost as exc:
                if exc.executed_possible:
                    raise
            else:
                return self._result(envelope, way[0])
            finally:
                self._pool.release(way[1])
        deadline = deadlines.tighten(timeout, started)
        envelope, target, channel = self._place(
            lambda channel, left: channel.call(wire, method, body, buffers or None, b"", codec, left),
            deadline,
        )
        self._release(target, channel)
        return self._result(envelope, target)

    def cast(self, method: str, /, *args: Any, **kwargs: Any) -> None:
        """Have ``method`` run on one server; return once the message has been handed to a live connection.

        At most once. What becomes of it afterwards nobody tells. The timeout bounds the handing over; the message
        itself does not expire.
        """
        buffers: list[Any] = []
        body = self._encode((args, kwargs), buffers)
        wire, codec, timeout = self._wire, self._codec_id, self.timeout
        started = time.monotonic()
        if _inherited() is None and (way := self._shortcut()) is not None:
            try:
                way[1].send("cast", wire, method, body, buffers or None, b"", codec, timeout)
                return
            except errors.PeerLost:
                pass
            finally:
                self._pool.release(way[1])
        deadline = deadlines.tighten(timeout, started)
        _, target, channel = self._place(
            lambda channel, left: channel.send("cast", wire, method, body, buffers or None, b"", codec, left),
            deadline,
        )
        self._release(target, channel)

    def fanout(self, method: str, /, *args: Any, **kwargs: Any) -> Fanout:
        """Have ``method`` run on every member that the topic has now; return who has been sent it and who not.

        At most once each. Raises NoSuchTopic if there is no member at all.
        """
        deadline = deadlines.tighten(self.timeout)
        buffers: list[Any] = []
        body = self._encode((args, kwargs), buffers)
        membership = self._membership(deadline)
        sent: list[Member] = []
        failed: dict[Member, Exception] = {}
        pool = self._pool
        for target in self._balancer.targets(membership):
            try:
                channel = pool.acquire(target.endpoint, _left(deadline))
                try:
                    channel.send(
                        "fanout",
                        self._wire,
                        method,
                        body,
                        buffers or None,
                        b"",
                        self._codec_id,
                        _left(deadline),
                    )
                finally:
                    pool.release(channel)
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
        body = self._encode((args, kwargs), buffers)
        membership = self._membership(deadline)
        gathered = Gathered(membership.epoch)
        started: list[tuple[Target, Channel, Pending]] = []
        pool = self._pool
        try:
            for target in self._balancer.targets(membership):
                try:
                    channel = pool.acquire(target.endpoint, _left(deadline))
                except errors.ZmqcoreError as exc:
                    gathered.missing[target.member] = exc
                    continue
                try:
                    pending = channel.submit(
                        self._wire,
                        method,
                        body,
                        buffers or None,
                        b"",
                        self._codec_id,
                        _left(deadline),
                        _nobody,
                    )
                except BaseException as exc:
                    pool.release(channel)
                    if not isinstance(exc, errors.ZmqcoreError):
                        raise
                    gathered.missing[target.member] = exc
                else:
                    started.append((target, channel, pending))
            for target, _, pending in started:
                try:
                    envelope = pending.envelope()
                except errors.ZmqcoreError as exc:
                    gathered.missing[target.member] = exc
                    continue
                try:
                    gathered.results[target.member] = self._result(envelope, target)
                except errors.ZmqcoreError as exc:
                    gathered.errors[target.member] = exc
        finally:
            for _, channel, pending in started:
                pending.cancel()
                pool.release(channel)
        return gathered

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Start a call and return a future of its result at once.

        Waiting in ``result()`` drives the call as call() would. Cancelling the future gives the call up. What keeps
        the request from being sent is raised here.
        """
        deadline = deadlines.tighten(self.timeout)
        buffers: list[Any] = []
        body = self._encode((args, kwargs), buffers)
        wire, codec = self._wire, self._codec_id
        future = CallFuture()
        future.pending, target, channel = self._place(
            lambda channel, left: channel.submit(
                wire, method, body, buffers or None, b"", codec, left, future.settle
            ),
            deadline,
        )
        future.sent(self, target, channel)
        return future

    def members(self) -> tuple[Member, ...]:
        """Return the members that the topic has now, as far as is known; possibly none."""
        return self._known().members

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

    # -- to whom ---------------------------------------------------------------------------------------------

    def _known(self) -> Membership:
        """Return the members as far as is known, without waiting for any."""
        if self._fixed is not None:
            return self._fixed
        watch = self._watch
        if watch is None:
            with self._watch_lock:
                if self._closed:
                    raise errors.Closed(f"{self!r} is closed")
                if self._watch is None:
                    self._watch = self._node.matchmaker.watch(self.topic)
                watch = self._watch
        return watch.current

    def _membership(self, deadline: float | None) -> Membership:
        """Return the members, waiting for a first one if there is none."""
        known = self._known()
        if known.members:
            return known
        watch = self._watch
        if watch is not None:
            patience = self.discovery_timeout
            if deadline is not None:
                patience = min(patience, max(0.0, deadline - time.monotonic()))
            found = watch.wait_for(_has_members, patience)
            if found is not None:
                return found
        raise errors.NoSuchTopic(
            f"nobody serves topic {str(self.topic)!r}, says {self._node.matchmaker.url}"
            f" (waited {self.discovery_timeout:g} s for a first member)"
        )

    def _shortcut(self) -> tuple[Target, Channel] | None:
        """Return the only member and the channel to it if it is open already, else None: nothing to decide.

        Most operations go this way; _place() is for all others. The channel goes back to the pool.
        """
        watch = self._watch
        known, target = self._balancer.only
        if known is None or known is not (self._fixed if watch is None else watch.current):
            return None
        assert target is not None
        channel = self._pool.acquire_open(target.endpoint)
        return None if channel is None else (target, channel)

    def _place(
        self, operate: Callable[[Channel, float | None], T], deadline: float | None
    ) -> tuple[T, Target, Channel]:
        """Do ``operate(channel, timeout)`` on the channel to one member; return its result, member and channel.

        The caller gives both back by _release(). While it is certain that nothing was executed, another member is
        tried, or the same one again a little later.
        """
        tried: list[Target] = []
        failure: errors.ZmqcoreError | None = None
        give_up = pause = 0.0
        pool, balancer = self._pool, self._balancer
        while True:
            membership = self._known()
            target = balancer.choose(membership, tried) if membership.members else None
            if target is None:
                if not tried:
                    self._membership(deadline)
                    continue
                # Everybody has refused. A server that is being restarted is back in a moment.
                assert failure is not None
                now = time.monotonic()
                if not give_up:
                    give_up, pause = now + self._node.connect_timeout, _PAUSE
                if now + pause > give_up or (deadline is not None and now + pause > deadline):
                    raise failure
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_MAX)
                tried.clear()
                continue
            try:
                channel = pool.acquire(target.endpoint, _left(deadline))
                try:
                    return operate(channel, _left(deadline)), target, channel
                except BaseException:
                    pool.release(channel)
                    raise
            except (errors.Unreachable, errors.PeerLost) as exc:
                balancer.done(target)
                if isinstance(exc, errors.PeerLost) and exc.executed_possible:
                    raise
                failure = exc
                tried.append(target)
            except BaseException:
                balancer.done(target)
                raise

    def _release(self, target: Target, channel: Channel) -> None:
        self._pool.release(channel)
        self._balancer.done(target)

    def _result(self, envelope: Envelope, target: Target) -> Any:
        """Return the result in a reply, or raise the error."""
        if envelope.kind == "reply" and envelope.codec == self._codec_id:
            return self._decode(envelope, envelope.buffers or ())
        if envelope.kind == "error" and envelope.codec in (0, self._codec_id):
            raise faults.to_exception(envelope, self._node.codec, target.endpoint)
        raise errors.ProtocolError(
            f"{target.endpoint} answered by a {envelope.kind!r} of codec {envelope.codec}; expected {self._codec_id}"
        )

    def close(self) -> None:
        """Stop watching the topic's membership. Sockets stay in the node's pool. Twice is fine."""
        self._closed = True
        with self._watch_lock:
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = ", ".join(self._connect) if self._connect else self._node.matchmaker.url
        return f"<Client {self.topic} by {where}{' closed' if self._closed else ''}>"


class CallFuture(concurrent.futures.Future[Any]):
    """The future of one submitted call. Who waits for it drives the call."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: Pending | None = None
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._way: tuple[Target, Channel] | None = None
        self._ended = False

    def sent(self, client: Client, target: Target, channel: Channel) -> None:
        """The request has left; its reply may even have come already."""
        with self._lock:
            self._client, self._way = client, (target, channel)
            ended = self._ended
        if ended:
            self._settle()

    def settle(self, pending: Pending) -> None:
        """The channel's callback: the request has ended."""
        self.pending = pending
        with self._lock:
            self._ended = True
            known = self._way is not None
        if known:
            self._settle()

    def _settle(self) -> None:
        client, way, pending = self._client, self._way, self.pending
        assert client is not None
        assert way is not None
        assert pending is not None
        client._release(*way)
        if not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(client._result(pending.envelope(), way[0]))
        except BaseException as exc:  # noqa: BLE001  (whatever it is, it belongs to who waits)
            self.set_exception(exc)

    def _drive(self, timeout: float | None) -> float | None:
        """Wait for the call; return what is left of ``timeout``."""
        pending = self.pending
        if pending is None or self.done():
            return timeout
        if timeout is None:
            pending.wait()
            return None
        until = time.monotonic() + timeout
        pending.wait(timeout)
        return max(0.0, until - time.monotonic())

    def result(self, timeout: float | None = None) -> Any:
        """Return the result, or raise what the call raised; TimeoutError if it has not ended in ``timeout`` s."""
        return super().result(self._drive(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; TimeoutError if it has not ended in ``timeout`` s."""
        return super().exception(self._drive(timeout))

    def cancel(self) -> bool:
        """Give the call up, unless it has ended. Whether the server runs it nobody knows."""
        if not super().cancel():
            return False
        pending = self.pending
        if pending is not None and pending.cancel() and self._client is not None and self._way is not None:
            self._client._release(*self._way)
            self.set_running_or_notify_cancel()
        return True


def _left(deadline: float | None) -> float | None:
    """Return the seconds until ``deadline``, 0 if it has passed."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    return left if left > 0 else 0.0


def _has_members(membership: Membership) -> bool:
    return bool(membership.members)


def _nobody(_: Pending) -> None:
    """Gather waits for its requests itself."""


def _fixed_membership(topic: Topic, connect: Sequence[str]) -> Membership:
    """Return the membership that ``connect=`` stands for: one member per endpoint."""
    if not connect:
        raise errors.InvalidEndpoint("connect is empty; name one endpoint at least")
    members = []
    for text in connect:
        endpoint = str(Endpoint.parse(text))
        members.append(
            Member(Topic(topic.name, topic.server or endpoint, topic.exchange), (endpoint,), endpoint, "", 0)
        )
    return Membership(0, tuple(members))
