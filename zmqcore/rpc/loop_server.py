"""An AsyncServer for programs without an event loop: it brings its own, on a thread, and is used like a Server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Sequence
from typing import Any

from zmqcore.matchmaker import Member
from zmqcore.node import Node
from zmqcore.rpc import sigterm
from zmqcore.rpc.async_server import AsyncServer
from zmqcore.rpc.dispatcher import public_methods
from zmqcore.rpc.interception import Interceptor
from zmqcore.rpc.request_log import request_log
from zmqcore.rpc.server import Server
from zmqcore.topic import Topic

__all__ = ["LoopServer", "server_for"]

#: How much longer than its own timeout stop() waits for a loop that somebody blocks, in seconds.
_GRACE = 1.5


class LoopServer:
    """Serve ``endpoint`` under ``topic`` by an :class:`AsyncServer` with these options. Thread-safe; starts once."""

    def __init__(self, topic: Topic, endpoint: Any, node: Node, **options: Any) -> None:
        self._server = AsyncServer(topic, endpoint, node=node, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = threading.Event()

    def start(self) -> LoopServer:
        """Start the thread; return once clients can find the server. Raises what AsyncServer.start() does."""
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        name = f"zmqcore-server-{self._server.topic}"
        threading.Thread(target=self._run, args=(started,), name=name, daemon=True).start()
        started.result()
        return self

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        finally:
            self._over.set()

    async def _serve(self, started: concurrent.futures.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._server.start()
        except BaseException as exc:  # noqa: BLE001 - raised by start()
            started.set_exception(exc)
            return
        started.set_result(None)
        await self._server.wait()

    def stop(self, drain: bool = True, timeout: float = 10.0) -> bool:
        """Stop as AsyncServer.stop() does; give up a little later than ``timeout`` if a handler blocks the loop."""
        if self._loop is None or self._over.is_set():
            return True
        stopping = self._server.stop(drain, timeout)
        try:
            finished = asyncio.run_coroutine_threadsafe(stopping, self._loop).result(timeout + _GRACE)
        except (RuntimeError, concurrent.futures.CancelledError):  # the loop has ended, or ends, meanwhile
            stopping.close()
            return True
        except TimeoutError:
            return False
        self._over.wait(_GRACE)
        return finished

    def serve_forever(self, drain_timeout: float = 10.0) -> bool:
        """Serve until stop() is called, Ctrl-C is pressed, or SIGTERM comes; see :meth:`Server.serve_forever`."""
        with sigterm.first(self.remove_files):
            try:
                with sigterm.interrupts():
                    self._over.wait()
            except KeyboardInterrupt:
                pass
            finally:
                finished = self.stop(timeout=drain_timeout)
        return finished

    def remove_files(self) -> None:
        """Remove the files of its sockets: the process is about to end without stopping it."""
        self._server.remove_files()

    @property
    def topic(self) -> Topic:
        return self._server.topic

    @property
    def instance(self) -> str:
        return self._server.instance

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self._server.endpoints

    @property
    def member(self) -> Member:
        return self._server.member


def server_for(
    topic: Topic,
    endpoint: Any,
    node: Node,
    *,
    workers: int,
    max_concurrency: int,
    interceptors: Sequence[Interceptor] = (),
    **options: Any,
) -> Server | LoopServer:
    """Return the server that suits ``endpoint``: with threads, or with a loop if it has coroutine functions.

    ``workers`` and ``max_concurrency``: how many handlers may run at a time, by either. Requests are logged if anybody
    wants to see them. Raises TypeError for what cannot be served.
    """
    methods = public_methods(endpoint, coroutines=True).values()
    if any(inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method) for method in methods):
        steps = (*request_log(coroutines=True), *interceptors)
        return LoopServer(
            topic, endpoint, node, max_concurrency=max_concurrency, interceptors=steps, **options
        )
    steps = (*request_log(coroutines=False), *interceptors)
    return Server(topic, endpoint, node=node, workers=workers, interceptors=steps, **options)
