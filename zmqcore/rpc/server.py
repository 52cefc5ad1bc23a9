"""Serve the public methods of an object under a topic, on threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from zmqcore._port import Port
from zmqcore.node import Node
from zmqcore.rpc import sigterm
from zmqcore.rpc.backlog import Backlog, OnFull, check_queue, check_workers
from zmqcore.rpc.executor import Inline, Threads
from zmqcore.rpc.interception import Interceptor
from zmqcore.rpc.service import Service
from zmqcore.topic import Topic

__all__ = ["Server"]

_logger = logging.getLogger("zmqcore.server")

#: How long the threads of a server that cannot be registered may take to leave, in seconds: they only have to wake up.
_LEAVE = 1.0


class Server(Service):
    """Serve ``endpoints`` (objects, modules, or mappings of names to callables) under ``topic``.

    ``node``: default, the process's. ``server``: this server's name, by which one can address it alone; default, the
    topic's, or ``host:pid``. ``workers=0`` runs handlers on the receiving thread (fastest; for short handlers that call
    nobody who calls back), ``workers=N`` on N threads: that many run at a time. ``queue_size``: how many requests may
    wait for a worker. Beyond that, ``on_full``: with ``"wait"`` the server stops reading and its clients' windows fill;
    with ``"reject"`` further calls are answered by Overloaded at once, and clients try another member. ``bind``: where
    to listen, e.g. ``"tcp://0.0.0.0:5555"``, or several. ``lease``: how long, in seconds, the matchmaker keeps a server
    that has died without a word. ``interceptors``: called around each request, the first outermost; see
    :class:`Operation`.

    Use it as a context manager, or call start() and stop(). One that was stopped can be started again. Thread-safe.
    """

    def __init__(
        self,
        topic: str | Topic,
        *endpoints: Any,
        node: Node | None = None,
        server: str | None = None,
        workers: int = 4,
        bind: str | Sequence[str] | None = None,
        queue_size: int = 1024,
        on_full: OnFull = "wait",
        lease: float = 10.0,
        interceptors: Sequence[Interceptor] = (),
    ) -> None:
        self._workers = check_workers(workers, on_full)
        self._queue_size, self._on_full = check_queue(queue_size, on_full)
        super().__init__(topic, endpoints, node, server, bind, lease, interceptors, coroutines=False)
        self.renew()

    def renew(self) -> None:
        """In a forked child: what runs is the parent's."""
        super().renew()
        # Reentrant: a signal handler may call stop() while its thread is in start() or stop().
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._stopped.set()
        self._executor: Inline | Threads | None = None
        self._leaving: Inline | Threads | None = None
        self._stopper: int | None = None  # the thread whose stop() began it

    def start(self) -> Server:
        """Listen, then register with the matchmaker. Returns once clients can find the server.

        Raises OSError if an endpoint cannot be bound, MatchmakerError if the registry cannot be reached, and
        RuntimeError if it runs already or no thread can be started. Nothing is left open then.
        """
        with self._lock:
            if self._executor is not None:
                raise RuntimeError(f"{self!r} runs already")
            if self._leaving is not None:
                raise RuntimeError(f"{self!r} is being stopped; wait() for that first")
            port, executor = self._open(), None
            try:
                executor = self._make_executor(port)
                executor.start()
                self._register(port)
            except BaseException:
                if executor is None:
                    port.close()
                else:
                    # Its threads run nothing yet: once they have left, the port and its files are gone.
                    executor.stop(drain=False, deadline=time.monotonic() + _LEAVE)
                raise
            self._executor = executor
            self._stopped.clear()
        _logger.info("serving %s at %s", self.topic, ", ".join(port.endpoints))
        return self

    def _make_executor(self, port: Port) -> Inline | Threads:
        if not self._workers:
            return Inline(port, self._dispatcher, str(self.topic))
        backlog = Backlog(self._queue_size, self._on_full)
        return Threads(port, self._dispatcher, self._workers, backlog, str(self.topic))

    def stop(self, drain: bool = True, timeout: float = 10.0) -> bool:
        """Deregister, take nothing new, finish what has come (with ``drain``), then close.

        Waits up to ``timeout`` seconds for handlers that are running. Returns whether all work was finished.
        Twice is fine, also at the same time: the second one only waits. Called by a handler, or by a signal handler
        that has interrupted another stop(), it returns False at once, and the server stops behind it.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            handler = self.runs_this_thread()
            executor, self._executor = self._executor, None
            if executor is not None:
                self._leaving = executor
                self._stopper = threading.get_ident()
        if executor is None:
            # What this thread itself is about to end, further down its stack, it cannot wait for.
            return not handler and self._stopper != threading.get_ident() and self._stopped.wait(timeout)
        if handler:
            name = f"zmqcore-stop-{self.topic}"
            threading.Thread(target=self._finish, args=(executor, drain, deadline), name=name).start()
            return False
        return self._finish(executor, drain, deadline)

    def _finish(self, executor: Inline | Threads, drain: bool, deadline: float) -> bool:
        try:
            self._deregister()
        finally:
            try:
                finished = executor.stop(drain, deadline)
            finally:
                self._stopper = self._leaving = None
                self._stopped.set()
        _logger.info("stopped serving %s", self.topic)
        return finished

    def runs_this_thread(self) -> bool:
        """Whether the calling thread runs one of its handlers."""
        executor = self._executor or self._leaving
        return executor is not None and executor.runs_this_thread()

    def ask_to_stop(self, timeout: float) -> None:
        """The node is being closed: begin to stop, within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with self._lock:
            executor = self._executor
        if executor is not None:
            self._deregister()
            executor.ask_to_stop(drain=True, deadline=deadline)

    def close_down(self, timeout: float) -> None:
        """The node is being closed: stop, within ``timeout`` seconds."""
        self.stop(timeout=timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has been stopped, or ``timeout`` seconds; return whether it has."""
        return self._stopped.wait(timeout)

    def serve_forever(self, drain_timeout: float = 10.0) -> bool:
        """Start if need be and serve until stop() is called, Ctrl-C is pressed, or SIGTERM comes; then drain.

        SIGTERM is listened to only on the main thread. While it drains, for ``drain_timeout`` seconds at most, another
        one ends the process at once. Returns whether all work was finished.
        """
        if self._executor is None:
            self.start()
        with sigterm.first(self.remove_files):
            try:
                with sigterm.interrupts():
                    self.wait()
            except KeyboardInterrupt:
                pass
            finally:
                finished = self.stop(timeout=drain_timeout)
        return finished

    def stats(self) -> dict[str, Any]:
        """Return what the server has counted, as a JSON-able dict."""
        executor = self._executor
        queued = executor.queued if executor is not None else 0
        return {**super().stats(), "workers": self._workers, "queued": queued}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
