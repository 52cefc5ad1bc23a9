"""What every server is: a topic, methods, a port that is registered with the matchmaker. How it runs is its own."""

from __future__ import annotations

import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from zmqcore import options
from zmqcore._port import Port
from zmqcore._version import __version__
from zmqcore.endpoint import Endpoint, in_option
from zmqcore.matchmaker import Lease, Member
from zmqcore.matchmaker.session import check_ttl
from zmqcore.node import Node, default_node
from zmqcore.rpc.dispatcher import Dispatcher, public_methods, signature_text
from zmqcore.rpc.forked import renew_in_child
from zmqcore.rpc.interception import Interceptor, chain, intercepted
from zmqcore.topic import Topic

__all__ = ["Service"]


class Service(ABC):
    """The common part of :class:`Server` and :class:`AsyncServer`. Not thread-safe by itself."""

    def __init__(
        self,
        topic: str | Topic,
        endpoints: tuple[Any, ...],
        node: Node | None,
        server: str | None,
        bind: str | Sequence[str] | None,
        lease: float,
        interceptors: Sequence[Interceptor],
        *,
        coroutines: bool,
    ) -> None:
        self._node = (
            default_node() if node is None else options.instance("node", node, Node, "a Node, or None")
        )
        topic = Topic.of(topic)
        name = server or topic.server or f"{socket.gethostname()}:{os.getpid()}"
        self.topic = Topic(topic.name, name, topic.exchange)
        self.instance = ""
        self._bind = None if bind is None else in_option("bind", bind, bind=True)
        self._lease_ttl = check_ttl("lease", lease)
        self._port: Port | None = None
        self._lease: Lease | None = None
        self._started_at: float | None = None
        methods = public_methods(*endpoints, coroutines=coroutines)
        steps = chain(interceptors, coroutines=coroutines)
        if steps:
            methods = {
                name: intercepted(name, method, steps, coroutines=coroutines)
                for name, method in methods.items()
            }
        renew_in_child(self)
        self._dispatcher = Dispatcher(self.topic, {**self._builtins(methods), **methods}, self._node.codec)

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
            "uptime": self._uptime(),
        }

    def _uptime(self) -> float:
        return 0.0 if self._started_at is None else time.monotonic() - self._started_at

    # -- steps of starting and stopping --------------------------------------------------------------------

    def _open(self) -> Port:
        """Return a port of this run."""
        self.instance = uuid.uuid4().hex
        self._node.own(self)
        return self._node.open_port(self._bind)

    def _register(self, port: Port) -> None:
        """Tell the matchmaker: from now on clients can find the server."""
        self._lease = self._node.matchmaker.register(
            Member(
                topic=self.topic,
                endpoints=tuple(self._announced(endpoint) for endpoint in port.endpoints),
                instance=self.instance,
                host=self._node.host,
                pid=os.getpid(),
                version=__version__,
            ),
            ttl=self._lease_ttl,
        )
        self._port = port
        self._started_at = time.monotonic()

    def _announced(self, text: str) -> str:
        """Return what clients connect to: not an address that means any interface."""
        endpoint = Endpoint.parse(text, bind=True)
        if endpoint.transport == "tcp" and endpoint.host in ("0.0.0.0", "::", "*"):
            return f"tcp://{self._node.advertised_host}:{endpoint.port}"
        return text

    @abstractmethod
    def runs_this_thread(self) -> bool:
        """Whether it cannot stop before the calling thread goes on."""

    @abstractmethod
    def ask_to_stop(self, timeout: float) -> None:
        """The node is being closed: begin to stop, within ``timeout`` seconds."""

    @abstractmethod
    def close_down(self, timeout: float) -> None:
        """The node is being closed: stop, within ``timeout`` seconds."""

    def renew(self) -> None:
        """In a forked child: what runs is the parent's."""
        self._port = None
        self._lease = None
        self._started_at = None

    def remove_files(self) -> None:
        """Remove the files of its sockets: the process is about to end without stopping it."""
        if self._port is not None:
            self._port.remove_files()

    def _deregister(self) -> None:
        """Leave the matchmaker's registry. Twice is fine."""
        lease, self._lease = self._lease, None
        self._started_at = None
        if lease is not None:
            lease.close()

    # -- what it tells about itself --------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it has been started and not been stopped."""
        return self._started_at is not None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens; empty before start()."""
        return self._port.endpoints if self._port is not None else ()

    @property
    def member(self) -> Member:
        """How the matchmaker knows it. Raises RuntimeError unless it runs."""
        lease = self._lease
        if lease is None:
            raise RuntimeError(f"{self!r} is not registered; start() it")
        return lease.member

    def stats(self) -> dict[str, Any]:
        """Return what the server has counted, as a JSON-able dict."""
        dispatcher = self._dispatcher
        return {
            "topic": str(self.topic),
            "instance": self.instance,
            "pid": os.getpid(),
            "endpoints": list(self.endpoints),
            "uptime": self._uptime(),
            "handled": dispatcher.handled,
            "failed": dispatcher.failed,
            "expired": dispatcher.expired,
            "refused": dispatcher.refused,
            "rejected": dispatcher.rejected,
            "port": self._port.stats() if self._port is not None else {},
            "node": self._node.stats(),
        }

    def __repr__(self) -> str:
        state = "serving at " + ", ".join(self.endpoints) if self.running else "not running"
        return f"<{type(self).__name__} {self.topic} {state}>"
