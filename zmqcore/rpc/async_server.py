"""Serve the public methods of an object under a topic, on an asyncio event loop."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from zmqcore import errors
from zmqcore._port import Port, Request
from zmqcore.node import Node
from zmqcore.rpc import deadline as deadlines
from zmqcore.rpc.dispatcher import Dispatcher
from zmqcore.rpc.service import Service
from zmqcore.topic import Topic

__all__ = ["AsyncServer"]

_logger = logging.getLogger("zmqcore.server")

_BATCH = 64
#: As for threads: how long a draining server still listens after the last message has come, in seconds.
_DRAIN_QUIET = 0.1
_DRAIN_STEP = 0.01
_LINGER = 2.0
#: How often calls that take long are acknowledged, in seconds.
_ACK_INTERVAL = 0.1


class AsyncServer(Service):
    """Serve ``endpoints`` under ``topic`` on the running event loop: coroutine functions as tasks, others inline.

    ``max_tasks``: how many coroutines may run at a time; beyond that the server stops reading and its clients' windows
    fill. The other options are those of :class:`Server`.

    Use it by ``async with``, or call start() and stop(). It belongs to the loop that has started it. Cancelling its
    tasks is stop(drain=False)'s; a plain function that blocks stops the whole loop.
    """

    def __init__(
        self,
        topic: str | Topic,
        *endpoints: Any,
        node: Node | None = None,
        server: str | None = None,
        max_tasks: int = 1024,
        bind: str | Sequence[str] | None = None,
        lease: float = 10.0,
    ) -> None:
        if max_tasks < 1:
            raise ValueError(f"max_tasks is {max_tasks}; it must be at least 1")
        super().__init__(topic, endpoints, node, server, bind, lease, coroutines=True)
        self._max_tasks = max_tasks
        self._reader: _Reader | None = None
        self._stopped: asyncio.Event | None = None

    async def start(self) -> AsyncServer:
        """Listen, then register with the matchmaker. Returns once clients can find the server.

        Raises OSError if an endpoint cannot be bound, MatchmakerError if the registry cannot be reached, and
        RuntimeError if it runs already.
        """
        if self._reader is not None:
            raise RuntimeError(f"{self!r} runs already")
        loop = asyncio.get_running_loop()
        port = self._open()
        self._reader = reader = _Reader(loop, port, self._dispatcher, self._max_tasks)
        reader.start()
        try:
            # The registry may be slow, and the loop has other work.
            await loop.run_in_executor(None, self._register, port)
        except BaseException:
            self._reader = None
            await reader.stop(drain=False, deadline=0.0)
            raise
        self._stopped = asyncio.Event()
        _logger.info("serving %s at %s", self.topic, ", ".join(port.endpoints))
        return self

    async def stop(self, drain: bool = True, timeout: float = 10.0) -> bool:
        """Deregister, take nothing new, finish what has come (with ``drain``), then close.

        Waits up to ``timeout`` seconds for tasks that are running, then cancels them. Returns whether all work was
        finished. Twice is fine.
        """
        reader, self._reader = self._reader, None
        if reader is None:
            return True
        deadline = time.monotonic() + timeout
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._deregister)
        finally:
            finished = await reader.stop(drain, deadline)
            if self._stopped is not None:
                self._stopped.set()
        _logger.info("stopped serving %s", self.topic)
        return finished

    def close_down(self, timeout: float) -> None:  # noqa: ARG002  (nothing can be waited for)
        """The node is being closed, and there is no loop to wait on: stop as things are."""
        reader, self._reader = self._reader, None
        self._deregister()
        if reader is not None:
            reader.close()

    def renew(self) -> None:
        """In a forked child: what runs is the parent's."""
        super().renew()
        self._reader = None

    async def wait(self) -> None:
        """Wait until the server has been stopped."""
        if self._stopped is not None:
            await self._stopped.wait()

    async def serve_forever(self) -> None:
        """Start if need be and serve until stop() is called or this coroutine is cancelled."""
        if self._reader is None:
            await self.start()
        try:
            await self.wait()
        finally:
            await self.stop()

    def stats(self) -> dict[str, Any]:
        """Return what the server has counted, as a JSON-able dict."""
        reader = self._reader
        return {**super().stats(), "tasks": reader.tasks if reader is not None else 0}

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
        self, loop: asyncio.AbstractEventLoop, port: Port, dispatcher: Dispatcher, max_tasks: int
    ) -> None:
        self._loop = loop
        self._port = port
        self._fd = port.fd
        self._dispatcher = dispatcher
        self._coroutines = {
            name for name, method in dispatcher.methods.items() if inspect.iscoroutinefunction(method)
        }
        self._max_tasks = max_tasks
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_due = False
        self._last_batch = 0.0
        self._acker: asyncio.TimerHandle | None = None
        self._open = True

    @property
    def tasks(self) -> int:
        """How many coroutines are running."""
        return len(self._tasks)

    def start(self) -> None:
        self._loop.add_reader(self._fd, self._look)
        self._acker = self._loop.call_later(_ACK_INTERVAL, self._acknowledge)

    async def stop(self, drain: bool, deadline: float) -> bool:
        """Take nothing new, finish what has come (with ``drain``) until ``deadline``, close the port."""
        finished = False
        try:
            if drain:
                self._port.goodbye()
                self._last_batch = time.monotonic()
                while time.monotonic() < deadline and not finished:
                    self._look()
                    await asyncio.sleep(_DRAIN_STEP)
                    quiet = time.monotonic() - self._last_batch >= _DRAIN_QUIET
                    finished = quiet and not self._tasks and self._port.settled()
        finally:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            # They answer their callers while they end.
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()
        return finished

    def close(self) -> None:
        """Close the port as things are."""
        self._open = False
        if self._acker is not None:
            self._acker.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._port.close(linger=_LINGER)

    def _look_soon(self) -> None:
        """Something was sent: the port must be looked at before the loop waits on its descriptor again."""
        if not self._look_due and self._open:
            self._look_due = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Receive a batch and run it."""
        self._look_due = False
        if not self._open or len(self._tasks) >= self._max_tasks:
            return  # the end of a task looks again
        try:
            batch = self._port.receive(_BATCH, 0.0)
            if not batch:
                self._port.flush()
                batch = self._port.receive(_BATCH, 0.0)
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
        if request.method not in self._coroutines:
            self._dispatcher.run(request)
            return
        remaining = request.remaining
        # The task's context is a copy of this one: it inherits the deadline, and nothing else of this request.
        token = deadlines.current.set(None if remaining is None else time.monotonic() + remaining)
        try:
            task = self._loop.create_task(self._dispatcher.run_async(request))
        finally:
            deadlines.current.reset(token)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._look_soon()

    def _acknowledge(self) -> None:
        """Calls that take long are acknowledged meanwhile, so that the client's window opens."""
        if self._open:
            self._port.flush(calls_too=True)
            self._look_soon()
            self._acker = self._loop.call_later(_ACK_INTERVAL, self._acknowledge)
