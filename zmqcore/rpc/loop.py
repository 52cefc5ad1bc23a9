"""The channels that one asyncio event loop drives."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable

from zmqcore import errors
from zmqcore._channel import Channel, Pending
from zmqcore._frame import Envelope
from zmqcore._pool import ChannelPool
from zmqcore.rpc.route import Message, time_left

__all__ = ["LoopChannels", "channels_of_running_loop"]

#: A channel on which nothing has happened for this long, in seconds, goes back to the pool.
_IDLE = 0.25


class _Driven:
    """One channel while this loop drives it."""

    __slots__ = ("channel", "deadline", "look_due", "room", "timer", "used")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.timer: asyncio.TimerHandle | None = None
        self.deadline = 0.0  # of the timer, on the loop's clock
        self.look_due = False
        self.used = True
        self.room: asyncio.Event | None = None  # set whenever the window may have opened


class LoopChannels:
    """Drive channels of ``pool`` by ``loop``: no thread and no task per call.

    The loop waits on each channel's descriptor; one look at the channel then resolves every future whose reply has
    come. What is sent during one turn of the loop needs a single look afterwards. All methods belong to the loop's
    thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: ChannelPool) -> None:
        self._loop = loop
        self._pool = pool
        self._thread = threading.get_ident()
        self._by_endpoint: dict[str, _Driven] = {}
        self._all: set[_Driven] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    async def call(self, endpoint: str, request: Message, deadline: float | None) -> Envelope:
        """Send a call to ``endpoint`` and return the reply's envelope. ``request`` is what Channel.call() takes.

        Cancelling gives the call up. Raises as Channel.call() and ChannelPool.acquire() do.
        """
        driven = self._by_endpoint.get(endpoint)
        if driven is None or not driven.channel.usable:
            driven = await self._drive(endpoint, deadline)
        loop = self._loop
        future = loop.create_future()
        settle = self._settle(future)
        while True:
            left = time_left(deadline)
            try:
                pending = driven.channel.submit_nowait(*request, left, settle)
                break
            except errors.Overloaded:
                if left == 0.0:
                    raise
                await self._room(driven, left)
        self._sent(driven, left)
        try:
            await future
        except BaseException:
            pending.cancel()
            raise
        return pending.envelope()

    async def send(self, endpoint: str, kind: str, request: Message, deadline: float | None) -> None:
        """Send a one-way message to ``endpoint``. Raises as Channel.send() and ChannelPool.acquire() do."""
        driven = self._by_endpoint.get(endpoint)
        if driven is None or not driven.channel.usable:
            driven = await self._drive(endpoint, deadline)
        while True:
            try:
                driven.channel.send(kind, *request, 0.0)
                break
            except errors.Overloaded:
                left = time_left(deadline)
                if left == 0.0:
                    raise
                await self._room(driven, left)
        self._sent(driven, None)

    # -- channels come and go ------------------------------------------------------------------------------

    async def _drive(self, endpoint: str, deadline: float | None) -> _Driven:
        """Get the channel to ``endpoint`` from the pool and let this loop drive it."""
        channel = self._pool.acquire_open(endpoint)
        if channel is None:
            channel = await self._acquire(endpoint, deadline)
        driven = self._by_endpoint.get(endpoint)
        if driven is not None and driven.channel is channel:
            self._pool.release(channel)  # another task was faster
            return driven
        driven = _Driven(channel)
        channel.adopt()  # if another loop drives it already, it is read by both
        self._loop.add_reader(channel.fd, self._look, driven)
        self._by_endpoint[endpoint] = driven
        self._all.add(driven)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_IDLE, self._sweep)
        return driven

    async def _acquire(self, endpoint: str, deadline: float | None) -> Channel:
        """ChannelPool.acquire() may wait for a place or for the connection: not on this thread."""
        waiting = self._loop.run_in_executor(None, self._pool.acquire, endpoint, time_left(deadline))
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            waiting.add_done_callback(self._give_back)
            raise

    def _give_back(self, acquired: asyncio.Future[Channel]) -> None:
        if not acquired.cancelled() and acquired.exception() is None:
            self._pool.release(acquired.result())

    def _sweep(self) -> None:
        """Give idle channels back to the pool."""
        self._sweeper = None
        for driven in tuple(self._all):
            if driven.used and driven.channel.usable:
                driven.used = False
            elif driven.channel.clean or driven.channel.state_name in ("lost", "closed"):
                self._let_go(driven)
        if self._all:
            self._sweeper = self._loop.call_later(_IDLE, self._sweep)

    def _let_go(self, driven: _Driven) -> None:
        self._all.discard(driven)
        if self._by_endpoint.get(driven.channel.endpoint) is driven:
            del self._by_endpoint[driven.channel.endpoint]
        if driven.timer is not None:
            driven.timer.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(driven.channel.fd)
        driven.channel.disown()
        self._pool.release(driven.channel)

    def release_idle(self) -> None:
        """Give the channels on which nothing is outstanding back to the pool at once."""
        for driven in tuple(self._all):
            if driven.channel.settle() or driven.channel.state_name in ("lost", "closed"):
                self._let_go(driven)

    # -- driving -------------------------------------------------------------------------------------------

    def _settle(self, future: asyncio.Future[None]) -> Callable[[Pending], None]:
        """Return a callback for the channel that resolves ``future``, on whichever thread it is called."""
        loop, thread = self._loop, self._thread

        def settle(_: Pending) -> None:
            if threading.get_ident() == thread:
                _resolve(future)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)

        return settle

    def _sent(self, driven: _Driven, timeout: float | None) -> None:
        """Something was sent: look at the channel once at the end of this turn, and at the deadline."""
        driven.used = True
        if not driven.look_due:
            driven.look_due = True
            self._loop.call_soon(self._look, driven)
        if timeout is not None:
            self._arm(driven, timeout)

    def _arm(self, driven: _Driven, timeout: float) -> None:
        due = self._loop.time() + timeout
        if driven.timer is not None:
            if driven.deadline <= due:
                return
            driven.timer.cancel()
        driven.deadline = due
        driven.timer = self._loop.call_at(due, self._expire, driven)

    def _expire(self, driven: _Driven) -> None:
        driven.timer = None
        left = self._look(driven)
        if left is not None:
            self._arm(driven, left)

    def _look(self, driven: _Driven) -> float | None:
        """Take what has come; return how many seconds are left until the next deadline."""
        driven.look_due = False
        try:
            left = driven.channel.attend()
        except errors.Closed:
            return None
        if driven.room is not None:
            driven.room.set()
            driven.room = None
        return left

    async def _room(self, driven: _Driven, timeout: float | None) -> None:
        """Wait until the window may have opened, or ``timeout`` seconds."""
        if driven.room is None:
            driven.room = asyncio.Event()
        try:
            await asyncio.wait_for(driven.room.wait(), timeout)
        except TimeoutError:
            pass


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[ChannelPool, LoopChannels]]
_of_loops = weakref.WeakKeyDictionary()


def channels_of_running_loop(pool: ChannelPool) -> LoopChannels:
    """Return the channels of ``pool`` that the running event loop drives. Raises RuntimeError if none runs."""
    loop = asyncio.get_running_loop()
    pools = _of_loops.setdefault(loop, {})
    channels = pools.get(pool)
    if channels is None:
        channels = pools[pool] = LoopChannels(loop, pool)
    return channels
