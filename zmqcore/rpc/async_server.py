"""Serve the public methods of an object under a topic, on an asyncio event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from zmqcore import errors, options
from zmqcore._port import Port
from zmqcore._request import Request
from zmqcore.node import Node
from zmqcore.rpc import deadline as deadlines
from zmqcore.rpc import sigterm
from zmqcore.rpc.backlog import Backlog, OnFull, check_queue, is_builtin
from zmqcore.rpc.dispatcher import Dispatcher
from zmqcore.rpc.handover import in_thread, on_loop
from zmqcore.rpc.interception import Interceptor
from zmqcore.rpc.producer import is_stream
from zmqcore.rpc.service import Service
from zmqcore.topic import Topic

__all__ = ["AsyncServer"]

_logger = logging.getLogger("zmqcore.server")

_BATCH = 64
#: As for threads: how long a draining server still listens after the last message has come, in seconds.
_DRAIN_QUIET = 0.1
_DRAIN_STEP = 0.01
_LINGER = 2.0
#: How long a client that is awake takes to read the last goodbye, in seconds.
_FAREWELL = 0.02
#: How often calls that take long are acknowledged, in seconds.
_ACK_INTERVAL = 0.1
#: How long tasks that have been cancelled may take to end, in seconds, before the port is closed all the same.
_CANCEL_GRACE = 1.0
#: How long the end of a node waits for a loop at least, in seconds, even if its time is over.
_LOOP_GRACE = 0.2

T = TypeVar("T")


class AsyncServer(Service):
    """Serve ``endpoints`` under ``topic`` on the running event loop: coroutine functions as tasks, others inline.

    ``max_concurrency``: how many coroutines may run at a time; up to ``queue_size`` more wait for their turn, and
    ``on_full`` says what happens beyond that. A caller that cancels has its coroutine cancelled. These and the other
    options are those of :class:`Server`. Plain functions run where they are received: none of the three concerns them,
    they are never rejected, and with nothing but such functions ``on_full="reject"`` is a ValueError. With
    ``interceptors`` they run as tasks, too.

    Use it by ``async with``, or call start() and stop(). It belongs to the loop that has started it; one that was
    stopped can be started again. A plain function that blocks stops the whole loop, and what comes meanwhile is not
    received: its deadline is counted from when it is. Every handler runs in a copy of the
    context in which start() was called, with its request's deadline: what one request sets no other one sees.
    """

    def __init__(
        self,
        topic: str | Topic,
        *endpoints: Any,
        node: Node | None = None,
        server: str | None = None,
        max_concurrency: int = 1024,
        bind: str | Sequence[str] | None = None,
        queue_size: int = 1024,
        on_full: OnFull = "wait",
        lease: float = 10.0,
        interceptors: Sequence[Interceptor] = (),
    ) -> None:
        self._max_concurrency = options.whole("max_concurrency", max_concurrency, 1)
        self._queue_size, self._on_full = check_queue(queue_size, on_full)
        super().__init__(topic, endpoints, node, server, bind, lease, interceptors, coroutines=True)
        methods = self._dispatcher.methods.items()
        if on_full == "reject" and not any(
            _runs_as_task(method) for name, method in methods if not is_builtin(name)
        ):
            raise ValueError(
                "on_full is 'reject' and there are plain functions only: they run where they are received and have no"
                " queue; serve them by a Server"
            )
        self._reader: _Reader | None = None
        self._leaving: _Reader | None = None
        self._stopped: asyncio.Event | None = None
        self._over: asyncio.Event | None = None  # it has been stopped, or is to be
        self._stopper: asyncio.Task[bool] | None = None
        self._asked: asyncio.Task[bool] | None = None

    async def start(self) -> AsyncServer:
        """Listen, then register with the matchmaker. Returns once clients can find the server.

        Raises OSError if an endpoint cannot be bound, MatchmakerError if the registry cannot be reached, and
        RuntimeError if it runs already.
        """
        if self._reader is not None:
            raise RuntimeError(f"{self!r} runs already")
        if self._leaving is not None:
            raise RuntimeError(f"{self!r} is being stopped; wait() for that first")
        reader = self._start_reader(asyncio.get_running_loop(), self._open())
        self._reader = reader
        self._stopped = stopped = asyncio.Event()
        self._over = asyncio.Event()
        try:
            # The registry may be slow, and the loop has other work.
            await in_thread(self._register, reader.port, unwanted=lambda _: self._deregister())
        except BaseException:
            if self._reader is reader:
                self._reader = None
            try:
                await reader.stop(drain=False, deadline=0.0)
            finally:
                stopped.set()
            raise
        if self._reader is not reader:
            await in_thread(self._deregister)
            raise errors.Closed("the server was stopped while it started")
        _logger.info("serving %s at %s", self.topic, ", ".join(reader.port.endpoints))
        return self

    def _start_reader(self, loop: asyncio.AbstractEventLoop, port: Port) -> _Reader:
        """Return what receives from ``port``, which is closed if that cannot be."""
        reader = None
        try:
            backlog = Backlog(self._queue_size, self._on_full)
            reader = _Reader(loop, port, self._dispatcher, self._max_concurrency, backlog)
            reader.start()
        except BaseException:
            (reader or port).close()
            raise
        return reader

    async def stop(self, drain: bool = True, timeout: float = 10.0) -> bool:
        """Deregister, take nothing new, finish what has come (with ``drain``), then close.

        Waits up to ``timeout`` seconds for tasks that are running, then cancels them: their callers get an error.
        Returns whether all work was finished. Twice is fine, also at the same time: the second one only waits.
        Called by a handler it returns False at once, and the server stops behind it.
        """
        reader, self._reader = self._reader, None
        current = reader or self._leaving
        handler = current is not None and current.runs(asyncio.current_task())
        if reader is None:
            stopped = self._stopped
            if handler or stopped is None:
                return not handler
            try:
                await asyncio.wait_for(stopped.wait(), timeout)
            except TimeoutError:
                return False
            return True
        self._leaving = reader
        finishing = self._finish(reader, drain, time.monotonic() + timeout)
        if handler:
            self._stopper = reader.spawn(finishing)
            return False
        return await finishing

    async def _finish(self, reader: _Reader, drain: bool, deadline: float) -> bool:
        try:
            try:
                await in_thread(self._deregister)
            finally:
                # Closed: this coroutine is being thrown away, and can wait for nothing any more.
                finished = not reader.loop.is_closed() and await reader.stop(drain, deadline)
        finally:
            self._ended(reader)
        _logger.info("stopped serving %s", self.topic)
        return finished

    def _ended(self, reader: _Reader) -> None:
        if self._leaving is reader:
            self._leaving = None
        for event in (self._stopped, self._over):
            if event is not None and not reader.loop.is_closed():
                event.set()

    def runs_this_thread(self) -> bool:
        """Whether it runs on the loop of the calling thread."""
        reader = self._reader or self._leaving
        return reader is not None and reader.loop.is_running() and reader.thread == threading.get_ident()

    def ask_to_stop(self, timeout: float) -> None:
        """The node is being closed: begin to stop, within ``timeout`` seconds, if the loop runs."""
        reader = self._reader
        if reader is None or not reader.loop.is_running():
            return

        def begin() -> None:
            # close_down() makes a second one, which only waits for this.
            self._asked = reader.spawn(self.stop(timeout=timeout))
            self._asked._log_destroy_pending = False  # type: ignore[attr-defined]

        with contextlib.suppress(RuntimeError):  # closed meanwhile
            reader.loop.call_soon_threadsafe(begin)

    def close_down(self, timeout: float) -> None:
        """The node is being closed: stop within ``timeout`` seconds; as things are if the loop does not run."""
        reader = self._reader or self._leaving
        if reader is None:
            self._deregister()
            return
        loop = reader.loop
        ended = threading.Event()
        until = time.monotonic() + timeout

        def begin() -> None:
            # Still runs after what began it here has been collected.
            self._stopper = reader.spawn(stop())
            # The loop may end before this does: what is left is done below then, and is nothing to complain of.
            self._stopper._log_destroy_pending = False  # type: ignore[attr-defined]

        async def stop() -> bool:
            try:
                return await self.stop(timeout=timeout)
            finally:
                ended.set()

        if loop.is_running() and on_loop(loop, begin, max(timeout, _LOOP_GRACE)) and loop.is_running():
            over = until + _CANCEL_GRACE
            while not ended.wait(_DRAIN_STEP) and not loop.is_closed() and time.monotonic() < over:
                pass
            if ended.is_set():
                return

        def abandon() -> None:
            self._reader = None
            try:
                reader.close()
            finally:
                self._ended(reader)

        self._deregister()
        on_loop(loop, abandon, max(until - time.monotonic(), _LOOP_GRACE))

    def renew(self) -> None:
        """In a forked child: what runs is the parent's."""
        super().renew()
        self._reader = self._leaving = None
        self._stopped = self._over = None

    async def wait(self) -> None:
        """Wait until the server has been stopped."""
        if self._stopped is not None:
            await self._stopped.wait()

    async def serve_forever(self, drain_timeout: float = 10.0) -> bool:
        """Start if need be and serve until stop() is called, this coroutine is cancelled, or SIGTERM comes; then drain.

        SIGTERM is listened to only on the main thread, and unless the program has a handler of its own. While it
        drains, for ``drain_timeout`` seconds at most, another one ends the process at once. Returns whether all work
        was finished.
        """
        if self._reader is None:
            await self.start()
        over = self._over
        assert over is not None, "start() has made it"
        try:
            with sigterm.sets(over):
                await over.wait()
        finally:
            with sigterm.first(self.remove_files):
                finished = await self.stop(timeout=drain_timeout)
        return finished

    def stats(self) -> dict[str, Any]:
        """Return what the server has counted, as a JSON-able dict."""
        reader = self._reader
        tasks, queued = (reader.tasks, reader.queued) if reader is not None else (0, 0)
        return {**super().stats(), "tasks": tasks, "queued": queued}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class _Reader:
    """Receive from one port on one event loop, and run what comes. All methods belong to the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        port: Port,
        dispatcher: Dispatcher,
        max_concurrency: int,
        backlog: Backlog,
    ) -> None:
        self.loop = loop
        self.thread = threading.get_ident()
        self.port = port
        port.batching = True  # every answer is followed by a look
        self._fd = port.fd
        self._dispatcher = dispatcher
        self._coroutines = {name for name, method in dispatcher.methods.items() if _runs_as_task(method)}
        self._context = contextvars.copy_context()
        # Started by a handler of another server, this one does not live under that request's deadline.
        self._context.run(deadlines.current.set, None)
        self._reading = False
        self._max_concurrency = max_concurrency
        self._backlog = backlog
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_due = False
        self._taking = True
        self._last_batch = 0.0
        self._acker: asyncio.TimerHandle | None = None
        self._open = True

    @property
    def tasks(self) -> int:
        """How many coroutines are running."""
        return len(self._tasks)

    @property
    def queued(self) -> int:
        """How many requests have been received and wait for a coroutine to end."""
        return len(self._backlog)

    def runs(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether ``task`` is one of its handlers."""
        return task in self._tasks

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that is nobody's handler."""
        return self.loop.create_task(coroutine, context=self._context.copy())

    def start(self) -> None:
        self._read()
        self._acker = self.loop.call_later(_ACK_INTERVAL, self._acknowledge, context=self._context)

    def _read(self) -> None:
        """Wait for what comes."""
        if not self._reading:
            self._reading = True
            self._context.copy().run(self.loop.add_reader, self._fd, self._look)

    def _stop_reading(self) -> None:
        """The descriptor stays readable as long as nobody receives: not to be waited for meanwhile."""
        if self._reading:
            self._reading = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self._fd)

    async def stop(self, drain: bool, deadline: float) -> bool:
        """Take nothing new, finish what has come (with ``drain``) until ``deadline``, close the port."""
        finished = False
        try:
            if drain:
                self.port.goodbye()
                self._last_batch = time.monotonic()
                while time.monotonic() < deadline and not finished:
                    self._look()
                    await asyncio.sleep(_DRAIN_STEP)
                    quiet = time.monotonic() - self._last_batch >= _DRAIN_QUIET
                    finished = quiet and not self._tasks and self.port.settled()
                if finished:
                    self._taking = False
                    self._stop_reading()
                    if self.port.farewell():
                        await asyncio.sleep(_FAREWELL)
        finally:
            self._taking = False
            self._stop_reading()
            # None when the loop has been closed and this is thrown away: nobody can be waited for.
            tasks = () if self.loop.is_closed() else tuple(self._tasks)
            for task in tasks:
                task.cancel()
            try:
                # They answer their callers while they end.
                if tasks:
                    await asyncio.wait(tasks, timeout=_CANCEL_GRACE)
            finally:
                self.close()
        return finished

    def close(self) -> None:
        """Close the port as things are."""
        self._open = False
        if self._acker is not None:
            self._acker.cancel()
        self._stop_reading()
        self.port.close(linger=_LINGER)

    def _look_soon(self) -> None:
        """Something was sent: the port must be looked at before the loop waits on its descriptor again."""
        if not self._look_due and self._open:
            self._look_due = True
            self.loop.call_soon(self._look, context=self._context)

    def _look(self) -> None:
        """Receive a batch and run it."""
        self._look_due = False
        if not self._taking or not self._open:
            return
        # Without room, cancels are still read; the end of a task looks again.
        room = 0 if self._backlog.full else _BATCH
        if not room and self.port.full:
            self._stop_reading()
            return
        self._read()
        try:
            batch = self.port.receive(room, 0.0)
            if not batch:
                self.port.flush()
                batch = self.port.receive(room, 0.0)
        except errors.Closed:
            return
        if not batch:
            return
        self._last_batch = time.monotonic()
        for request in batch:
            try:
                self._begin(request)
            except Exception as exc:  # noqa: BLE001 - give_up() logs it
                self._dispatcher.give_up(request, exc)
        self._look_soon()

    def _begin(self, request: Request) -> None:
        """Run a plain function; make a coroutine a task, or have it wait for its turn."""
        if request.method not in self._coroutines:
            self._context.copy().run(self._dispatcher.run, request)
        elif len(self._tasks) < self._max_concurrency:
            self._start_task(request)
        else:
            for rejected in self._backlog.admit([request], 0):
                limits = f"max_concurrency={self._max_concurrency} and queue_size={self._backlog.size}"
                self._dispatcher.reject(rejected, limits)

    def _start_task(self, request: Request) -> None:
        context = self._context.copy()
        remaining = request.remaining
        if remaining is not None:
            context.run(deadlines.current.set, time.monotonic() + remaining)
        task = self.loop.create_task(self._dispatcher.run_async(request, self._look_soon), context=context)
        if request.wants_reply:
            request.watcher = task.cancel
        self._tasks.add(task)
        task.add_done_callback(self._ended, context=self._context)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._backlog and self._taking and self._open:
            self._start_task(self._backlog.popleft())
        self._look_soon()

    def _acknowledge(self) -> None:
        """Calls that take long are acknowledged meanwhile, so that the client's window opens."""
        if self._open:
            self.port.flush(calls_too=True)
            self._look_soon()
            self._acker = self.loop.call_later(_ACK_INTERVAL, self._acknowledge, context=self._context)


def _runs_as_task(method: Callable[..., Any]) -> bool:
    makes_coroutines = inspect.iscoroutinefunction(method) or inspect.iscoroutinefunction(
        type(method).__call__
    )
    return makes_coroutines or is_stream(method)
