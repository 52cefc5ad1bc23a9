"""RPyC: ThreadedServer, connections without Nagle's algorithm; one way and in flight by ``rpyc.async_``."""

from __future__ import annotations

import socket
from typing import Any

import rpyc
from peer import Target, host_and_port, obey_beside, say
from rpyc.core.channel import Channel
from rpyc.core.stream import SocketStream
from rpyc.utils.server import ThreadedServer

from peers.roles import run_blocking

Channel.COMPRESSION_THRESHOLD = 1 << 40  # on loopback, copying is faster than compressing

BACKLOG = 512
POLL_EVERY = 64
"""Casts between two looks at the answers, which RPyC's servers send to everything."""

target = Target()


class Service(rpyc.Service):  # type: ignore[misc]
    """The methods that are called from afar."""

    exposed_echo = staticmethod(target.echo)
    exposed_tick = staticmethod(target.tick)
    exposed_finish = staticmethod(target.finish)


def serve(endpoint: str) -> None:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    server = ThreadedServer(Service, hostname=host, port=0, backlog=BACKLOG)
    # Accepted connections inherit it; without, each large answer waits 40 ms for an acknowledgement.
    server.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.listener.listen(BACKLOG)  # it would do so only when it starts
    say(endpoint=f"tcp://{host}:{server.port}")
    obey_beside()
    server.start()


class Answer:
    """RPyC's asynchronous result, with the name that a future has for it."""

    def __init__(self, pending: Any) -> None:
        self.pending = pending

    def result(self) -> Any:
        self.pending.wait()
        return self.pending.value


class Connected:
    def __init__(self, endpoint: str) -> None:
        host, port = host_and_port(endpoint)
        self.connection = rpyc.connect_stream(SocketStream.connect(host, port, nodelay=True))
        root = self.connection.root
        self.call, self._finish = root.echo, root.finish
        self._echo, self._tick = rpyc.async_(root.echo), rpyc.async_(root.tick)
        self.unread = 0

    def submit(self, payload: bytes) -> Answer:
        return Answer(self._echo(payload))

    def cast(self, payload: bytes) -> None:
        self._tick(payload)
        self.unread += 1
        if self.unread == POLL_EVERY:  # else both would be stuck, each with a full socket
            self.connection.poll_all()
            self.unread = 0

    def finish(self) -> tuple[int, int]:
        handled, last = self._finish()
        return handled, last

    def close(self) -> None:
        self.connection.close()


if __name__ == "__main__":
    run_blocking(serve, Connected, "rpyc")
