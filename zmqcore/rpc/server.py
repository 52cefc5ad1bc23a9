"""Serve the public methods of an object under a topic."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from zmqcore._port import Port
from zmqcore._version import __version__
from zmqcore.matchmaker import Lease, Member
from zmqcore.node import Node, default_node
from zmqcore.rpc.dispatcher import Dispatcher, public_methods, signature_text
from zmqcore.rpc.executor import Inline, Threads
from zmqcore.topic import Topic

__all__ = ["Server"]

_logger = logging.getLogger("zmqcore.server")


class Server:
    """Serve ``endpoints`` (objects, modules, or mappings of names to callables) under ``topic``.

    ``node``: default, the process's. ``server``: this server's name, by which one can address it alone; default
    ``host:pid``. ``workers=0`` runs handlers on the receiving thread (fastest; for short handlers that call nobody
    who calls back), ``workers=N`` on N threads. ``queue_size``: how many requests may wait for a worker; beyond
    that the server stops reading and its clients' windows fill. ``bind``: where to listen, e.g.
    ``"tcp://0.0.0.0:5555"``, or several. ``lease``: how long, in seconds, the matchmaker keeps a server that has
    died without a word.

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
        lease: float = 10.0,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers is {workers}; 0 runs handlers on the receiving thread, N on N threads")
        if queue_size < 1:
            raise ValueError(f"queue_size is {queue_size}; it must be at least 1")
        self._node = node if node is not None else default_node()
        topic = Topic.of(topic)
        name = server or topic.server or f"{socket.gethostname()}:{os.getpid()}"
        self.topic = Topic(topic.name, name, topic.exchange)
        self._workers = workers
        self._bind = (bind,) if isinstance(bind, str) else bind
        self._queue_size = queue_size
        self._lease_ttl = lease
        methods = public_methods(*endpoints)
        self._dispatcher = Dispatcher(self.topic, {**self._builtins(methods), **methods}, self._node.codec)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._stopped.set()
        self._port: Port | None = None
        self._lease: Lease | None = None
        self._executor: Inline | Threads | None = None
        self._started_at = 0.0
        self.instance = ""

    def _builtins(self, methods: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        return {
            "zmqcore.ping": self._ping,
            "zmqcore.stats": self.stats,
            "zmqcore.methods": lambda: {
                name: signature_text(method) for name, method in sorted(methods.items())
            },
        }

    def _ping(self) -> dict[str, Any]:
        return {
            "server": self.topic.server,
            "instance": self.instance,
            "pid": os.getpid(),
            "uptime": time.monotonic() - self._started_at,
        }

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> Server:
        """Listen, then register with the matchmaker. Returns once clients can find the server.

        Raises OSError if an endpoint cannot be bound, MatchmakerError if the registry cannot be reached, and
        RuntimeError if it runs already.
        """
        with self._lock:
            if self._executor is not None:
                raise RuntimeError(f"{self!r} runs already")
            self.instance = uuid.uuid4().hex
            port = self._node.open_port(self._bind)
            executor = self._make_executor(port)
            executor.start()
            try:
                self._lease = self._node.matchmaker.register(
                    Member(
                        topic=self.topic,
                        endpoints=port.endpoints,
                        instance=self.instance,
                        host=self._node.host,
                        pid=os.getpid(),
                        version=__version__,
                    ),
                    ttl=self._lease_ttl,
                )
            except BaseException:
                executor.stop(drain=False, deadline=0.0)
                raise
            self._port, self._executor = port, executor
            self._started_at = time.monotonic()
            self._stopped.clear()
            self._node.own(self)
        _logger.info("serving %s at %s", self.topic, ", ".join(port.endpoints))
        return self

    def _make_executor(self, port: Port) -> Inline | Threads:
        if not self._workers:
            return Inline(port, self._dispatcher, str(self.topic))
        return Threads(port, self._dispatcher, self._workers, self._queue_size, str(self.topic))

    def stop(self, drain: bool = True, timeout: float = 10.0) -> bool:
        """Deregister, take nothing new, finish what has come (with ``drain``), then close.

        Waits up to ``timeout`` seconds for handlers that are running. Returns whether all work was finished.
        Twice is fine, also at the same time.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            executor, self._executor = self._executor, None
            lease, self._lease = self._lease, None
            if executor is None:
                return True
            if lease is not None:
                lease.close()
            finished = executor.stop(drain, deadline)
            self._stopped.set()
        _logger.info("stopped serving %s", self.topic)
        return finished

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has been stopped, or ``timeout`` seconds; return whether it has."""
        return self._stopped.wait(timeout)

    def serve_forever(self) -> None:
        """Start if need be and serve until stop() is called or Ctrl-C is pressed."""
        if self._executor is None:
            self.start()
        try:
            self.wait()
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- what it tells about itself --------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it has been started and not been stopped."""
        return self._executor is not None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens; empty before start()."""
        return self._port.endpoints if self._port is not None else ()

    @property
    def member(self) -> Member:
        """How the matchmaker knows it. Raises RuntimeError before start()."""
        lease = self._lease
        if lease is None:
            raise RuntimeError(f"{self!r} is not registered; start() it")
        return lease.member

    def stats(self) -> dict[str, Any]:
        """Return what the server has counted, as a JSON-able dict."""
        executor, dispatcher = self._executor, self._dispatcher
        return {
            "topic": str(self.topic),
            "instance": self.instance,
            "pid": os.getpid(),
            "endpoints": list(self.endpoints),
            "workers": self._workers,
            "uptime": time.monotonic() - self._started_at if executor is not None else 0.0,
            "handled": dispatcher.handled,
            "failed": dispatcher.failed,
            "expired": dispatcher.expired,
            "refused": dispatcher.refused,
            "queued": executor.queued if executor is not None else 0,
            "port": self._port.stats() if self._port is not None else {},
            "node": self._node.stats(),
        }

    def __repr__(self) -> str:
        state = "serving at " + ", ".join(self.endpoints) if self.running else "not running"
        return f"<Server {self.topic} {state}>"
