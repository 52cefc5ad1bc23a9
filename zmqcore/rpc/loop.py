"""The channels that one asyncio event loop drives."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._frame import Envelope
from zmqcore._loop import Driven, LoopCalls, Reply
from zmqcore._pending import Pending
from zmqcore._retention import Lane
from zmqcore.node import Node
from zmqcore.rpc.deadline import check_time, seconds_until
from zmqcore.rpc.handover import in_thread, on_loop
from zmqcore.rpc.route import Message
from zmqcore.rpc.stream import AsyncStream, Read
from zmqcore.rpc.turns import Refused, Turns, Waiting

__all__ = ["LoopChannels", "channels_of_running_loop"]

#: A channel on which nothing has happened for this long, in seconds, goes back to the pool.
_IDLE = 0.25
#: While somebody waits for a place in the pool, idle channels are looked for this often, in seconds.
_WANTED_INTERVAL = 0.005
#: How many connections a loop opens at a time, each by a thread that waits for it.
_CONNECTORS = 32
#: Who waits for room in a window looks this often, in seconds, even if nothing wakes it: another thread may have taken
#: the acknowledgement.
_ROOM_INTERVAL = 0.01

T = TypeVar("T")


class LoopChannels(LoopCalls):
    """Drive channels of ``node``'s pool by the running loop: no thread and no task per call.

    The loop waits on each channel's descriptor; one look at the channel then resolves every future whose reply has
    come. What is sent during one turn of the loop needs a single look afterwards. All methods belong to the loop's
    thread, unless they say something else.

    What is outside the loop (pool, channels) refers to it weakly only: a loop that was closed with calls outstanding
    is garbage with its futures and tasks, and then its channels go back to the pool.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, node: Node) -> None:
        # What the loop calls later shall not keep the context of some request, nor see it.
        super().__init__(loop, contextvars.Context())
        self._node = weakref.ref(node)  # as long as a channel is driven, that holds it
        self._all: set[Driven] = set()
        self._held: set[Channel] = set()  # the channels of _all, for when the loop is garbage
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._connectors = asyncio.Semaphore(_CONNECTORS)
        self._sweeper: asyncio.TimerHandle | None = None
        self._fresh: set[Driven] = set()  # those that nobody may have had time to use
        self._giving_way: asyncio.TimerHandle | None = None
        self._closed = False
        abandoned = weakref.finalize(loop, _abandon, self._held, self._node)
        abandoned.atexit = False
        node.own(self)
        node.pool.add_holder(self)

    def drives(self, endpoint: str) -> bool:
        """Whether there is a connection to ``endpoint`` already."""
        driven = self.by_endpoint.get(endpoint)
        return driven is not None and driven.channel.usable

    async def call(self, endpoint: str, request: Message, deadline: float | None) -> Envelope:
        """Send a call to ``endpoint`` and return the reply's envelope. ``request`` is what Channel.call() takes.

        Cancelling gives the call up, and tells the server. Raises as Channel.call() and ChannelPool.acquire() do.
        """
        driven = self.by_endpoint.get(endpoint)
        if driven is None or not driven.channel.usable:
            driven = await self.drive(endpoint, deadline)
        if driven.must_hear_hello(request):
            await in_thread(driven.channel.ping, check_time(deadline))  # it answers by a hello first
        check_time(deadline)
        begin = partial(self._begin, driven, request, deadline)
        reply: Reply | None = None
        if not driven.waiting:
            try:
                reply = begin()
            except errors.Overloaded:
                pass
        if reply is None:
            reply = await self._in_turn(driven, driven.waiting, deadline, begin)
        await reply
        return reply.envelope()

    def _begin(self, driven: Driven, request: Message, deadline: float | None) -> Reply:
        pending = driven.channel.submit_nowait(*request, seconds_until(deadline), self.settle)
        reply = self.expect(pending, driven)
        self.sent(driven, deadline)
        return reply

    def stream(self, pending: Pending, read: Read) -> AsyncStream:
        """Return the stream that ``pending``, a call on this loop, was answered by."""
        driven = next(driven for driven in self._all if driven.channel is pending.channel)
        return AsyncStream(pending, read, partial(self._item, driven, pending), partial(self.told, driven))

    async def _item(self, driven: Driven, pending: Pending, timeout: float | None) -> None:
        """Wait until the next item of ``pending`` is there, or it has ended; by its own deadline at the latest."""
        if pending.notify(self.settle):
            reply = self.expect(pending, driven)
            self.sent(driven, None if timeout is None else time.monotonic() + timeout)
            await reply

    async def send(
        self, endpoint: str, kind: str, request: Message, deadline: float | None, lane: Lane | None = None
    ) -> None:
        """Send a one-way message to ``endpoint``, with ``lane`` an accepted one.

        Raises as Channel.send() or send_accepted() and ChannelPool.acquire() do.
        """
        driven = self.by_endpoint.get(endpoint)
        if driven is None or not driven.channel.usable:
            driven = await self.drive(endpoint, deadline)
        if driven.must_hear_hello(request):
            await in_thread(driven.channel.ping, check_time(deadline))  # it answers by a hello first
        check_time(deadline)
        send: Callable[..., int] = driven.channel.send
        waiting = driven.waiting
        if lane is not None:
            # What waits for something to be finished does not stand in the way of calls.
            send, waiting = partial(driven.channel.send_accepted, lane), driven.waiting_to_accept
        attempt = partial(send, kind, *request, 0.0)
        sent = 0
        if not waiting:
            try:
                sent = attempt()
            except errors.Overloaded:
                pass
        if not sent:
            await self._in_turn(driven, waiting, deadline, attempt)
        self.sent(driven, None)

    async def _in_turn(
        self, driven: Driven, turns: Turns, deadline: float | None, attempt: Callable[[], T]
    ) -> T:
        """Return what ``attempt()`` returns once there is room; who came first into ``turns`` goes first.

        Raises Overloaded at the deadline, and PeerLost when the channel has gone.
        """
        turn = self.turn()
        began = time.monotonic()
        number = turns.join(Waiting(turn, attempt, deadline))
        # What was sent so far is on its way; its acknowledgement is what makes room.
        soon = began + _ROOM_INTERVAL
        self.sent(driven, soon if deadline is None else min(soon, deadline))
        try:
            await turn
        except BaseException:
            turns.pop(number, None)
            if isinstance(turn.outcome, Reply):
                turn.outcome.close()  # interrupted after it has been sent
            raise
        outcome = turn.outcome
        if isinstance(outcome, Refused):
            raise outcome.make()
        return outcome  # type: ignore[no-any-return]

    # -- channels come and go ------------------------------------------------------------------------------

    async def drive(self, endpoint: str, deadline: float | None) -> Driven:
        """Let this loop drive the channel to ``endpoint``, an open one or, by ``deadline``, a new one."""
        while True:
            driven = self.by_endpoint.get(endpoint)
            if driven is not None and driven.channel.usable:
                return driven
            node = self._open_node()
            channel = node.pool.acquire_open(endpoint)
            if channel is not None:
                return self._take_up(channel, node)
            connecting = self._connecting.get(endpoint)
            mine = connecting is None or connecting.done()
            if connecting is None or connecting.done():
                # One thread, however many wait for this endpoint.
                connecting = self.loop.create_task(
                    self._connect(node, endpoint, deadline), context=self.context.copy()
                )
                self._connecting[endpoint] = connecting
                connecting.add_done_callback(lambda task: self._connected(endpoint, task))
            left = check_time(deadline)
            await asyncio.wait([connecting], timeout=left)
            if not connecting.done():
                raise errors.Unreachable(
                    f"{endpoint}: no connection within the {left or 0.0:.3g} s that were left"
                )
            if connecting.cancelled():
                continue
            exc = connecting.exception()
            if exc is None:
                continue
            # The one who began may have had less time.
            if mine or not isinstance(
                exc, (errors.Unreachable, errors.PoolExhausted, errors.DeadlineExceeded)
            ):
                raise exc
            check_time(deadline)

    def _open_node(self) -> Node:
        node = self._node()
        if node is None or self._closed:
            raise errors.Closed("the node is closed")
        return node

    async def _connect(self, node: Node, endpoint: str, deadline: float | None) -> None:
        """ChannelPool.acquire() may wait for a place or for the connection: not on this thread."""
        pool = node.pool
        async with self._connectors:
            channel = await in_thread(pool.acquire, endpoint, check_time(deadline), unwanted=pool.release)
        if self._closed:
            pool.release(channel)
            raise errors.Closed("the node is closed")
        self._take_up(channel, node)

    def _connected(self, endpoint: str, task: asyncio.Task[None]) -> None:
        if self._connecting.get(endpoint) is task:
            del self._connecting[endpoint]
        if not task.cancelled():
            task.exception()  # all who waited for it may have been cancelled: that it failed is no news then

    def _take_up(self, channel: Channel, node: Node) -> Driven:
        """``channel`` has been acquired: drive it."""
        endpoint = channel.endpoint
        driven = self.by_endpoint.get(endpoint)
        if driven is not None and driven.channel is channel:
            node.pool.release(channel)  # another task was faster
            return driven
        driven = Driven(channel, node, Turns(), Turns())
        self._all.add(driven)
        self._fresh.add(driven)
        self._held.add(channel)
        self.by_endpoint[endpoint] = driven
        self.context.copy().run(self.loop.add_reader, driven.fd, self._look, driven)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(_IDLE, self._sweep, context=self.context)
        self.sent(driven, None)
        return driven

    def _sweep(self) -> None:
        """Give idle channels back to the pool."""
        self._sweeper = None
        for driven in tuple(self._all):
            if driven.used and driven.channel.usable:
                driven.used = False
            elif driven.channel.clean and not driven.waiting:
                self._let_go(driven)
        if self._all:
            self._sweeper = self.loop.call_later(_IDLE, self._sweep, context=self.context)

    def _let_go(self, driven: Driven) -> None:
        channel = driven.channel
        if driven not in self._all:
            return
        self._all.discard(driven)
        self._fresh.discard(driven)
        if self.by_endpoint.get(channel.endpoint) is driven:
            del self.by_endpoint[channel.endpoint]
        if driven.timer is not None:
            driven.timer.cancel()
        if not self.loop.is_closed():
            # Before its socket can be closed: the number of the descriptor may have another meaning then.
            self.loop.remove_reader(driven.fd)
            for turns in (driven.waiting, driven.waiting_to_accept):
                turns.end(Refused(partial(self._gone, channel.endpoint)))
        self._held.discard(channel)
        if driven.adopted:
            channel.disown()
        driven.node.pool.release(channel)

    def release_idle(self, keep: set[Driven] | frozenset[Driven] = frozenset()) -> None:
        """Give the channels on which nothing is outstanding back to the pool at once, but for those to ``keep``."""
        for driven in self._all - keep:
            if not driven.waiting and (driven.channel.settle() or _is_gone(driven.channel)):
                self._let_go(driven)

    def give_way(self) -> None:
        """Somebody waits for a place in the pool. Called by any thread."""
        if self._giving_way is not None:
            return  # it looks whether anybody waits
        try:
            self.loop.call_soon_threadsafe(self._give_way, context=self.context)
        except RuntimeError:
            pass  # the loop is closed: it is about to give everything back

    def _give_way(self) -> None:
        """Give back what is idle, again and again until nobody waits for a place any more."""
        node = self._node()
        if node is None or self._closed or self._giving_way is not None or not node.pool.waiting:
            return
        # Whose server has not said what it takes may be about to be asked that.
        silent = {driven for driven in self._all if driven.used and driven.channel.peer_instance is None}
        self.release_idle(self._fresh | silent)
        self._fresh.clear()
        for driven in self._all:
            driven.used = False
        self._giving_way = self.loop.call_later(
            _WANTED_INTERVAL, self._go_on_giving_way, context=self.context
        )

    def _go_on_giving_way(self) -> None:
        self._giving_way = None
        self._give_way()

    # -- the end -------------------------------------------------------------------------------------------

    def runs_this_thread(self) -> bool:
        """Never: nothing has to go on for the channels to be given back."""
        return False

    def ask_to_stop(self, timeout: float) -> None:
        """Not before the servers have stopped: their handlers may be calling."""

    def close_down(self, timeout: float) -> None:
        """The node is being closed: give all channels back, whose sockets are closed next. Called by any thread."""
        if self.loop.is_closed() or threading.get_ident() == self.thread or not self.loop.is_running():
            self._close()
        else:
            on_loop(self.loop, self._close, timeout)

    def _close(self) -> None:
        self._closed = True
        for timer in (self._sweeper, self._giving_way):
            if timer is not None:
                timer.cancel()
        self._sweeper = self._giving_way = None
        for driven in tuple(self._all):
            self._let_go(driven)

    # -- driving -------------------------------------------------------------------------------------------

    def _arm(self, driven: Driven, deadline: float) -> None:
        if driven.timer is not None:
            driven.timer.cancel()
        driven.deadline = deadline
        left = max(0.0, deadline - time.monotonic())
        driven.timer = self.loop.call_later(left, self._expire, driven, context=self.context)

    def _expire(self, driven: Driven) -> None:
        driven.timer = None
        left = self._look(driven)
        if left is not None:
            self._arm(driven, time.monotonic() + left)

    def _look(self, driven: Driven) -> float | None:
        """Take what has come; return how many seconds are left until the next deadline."""
        driven.look_due = False
        channel = driven.channel
        if driven not in self._all:
            return None
        try:
            left = self.attend(channel)
        except errors.Closed:
            return None  # in a forked child
        if not channel.usable and _is_gone(channel):
            self._let_go(driven)
            return None
        for turns in (driven.waiting, driven.waiting_to_accept):
            if turns:
                turns.expire(_no_room(driven, turns is driven.waiting_to_accept))
                turns.serve()
            if turns:
                left = min(each for each in (left, turns.seconds_left(), _ROOM_INTERVAL) if each is not None)
        return left

    def _gone(self, endpoint: str) -> Exception:
        """Return the error for one who waits for room on a channel that this loop drives no longer."""
        if self._closed:
            return errors.Closed("the node is closed")
        return errors.PeerLost(
            f"{endpoint}: the connection was lost; this message had not been sent", executed_possible=False
        )


def _no_room(driven: Driven, to_accept: bool) -> Refused:
    """Return what is told to those who have waited for room in vain."""
    channel = driven.channel
    stats = channel.stats()
    limits = f"(limits {driven.node.window_messages} and {driven.node.window_bytes})"
    if to_accept:
        what = (
            f"not finished {stats['retained']} accepted messages of {stats['retained_bytes']} bytes {limits}"
        )
    else:
        what = (
            f"taken nothing for too long: {stats['window_messages']} messages and {stats['window_bytes']}"
            f" bytes are unacknowledged {limits}"
        )
    text = f"{channel.endpoint} has {what}; gave up at the deadline; this message had not been sent"
    return Refused(partial(errors.Overloaded, text))


def _is_gone(channel: Channel) -> bool:
    return channel.state_name in ("lost", "closed")


def _abandon(held: set[Channel], reference: weakref.ref[Node]) -> None:
    """The loop is garbage. Its collection may have come in the middle of anything, so no lock can be taken here, and
    Thread.start() takes some."""
    node = reference()
    if held and node is not None:
        _thread.start_new_thread(_give_back, (tuple(held), node))


def _give_back(channels: tuple[Channel, ...], node: Node) -> None:
    for channel in channels:
        try:
            channel.disown()
        except errors.ZmqcoreError:
            pass
        node.pool.release(channel)


#: The attribute of an event loop that holds its LoopChannels, one for each node. They belong to the loop and to nobody
#: else, so that all of it is one piece of garbage in the end.
_ATTRIBUTE = "_zmqcore_channels"


def channels_of_running_loop(node: Node) -> LoopChannels:
    """Return the channels of ``node`` that the running event loop drives. Raises RuntimeError if none runs."""
    loop = asyncio.get_running_loop()
    of_loop: dict[str, Any] = loop.__dict__
    of_nodes: weakref.WeakKeyDictionary[Node, LoopChannels] | None = of_loop.get(_ATTRIBUTE)
    if of_nodes is None:
        of_nodes = of_loop[_ATTRIBUTE] = weakref.WeakKeyDictionary()
    channels = of_nodes.get(node)
    if channels is None:
        channels = of_nodes[node] = LoopChannels(loop, node)
    return channels
