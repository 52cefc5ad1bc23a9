"""zerorpc: calls by its client, one way by Pusher and Puller, to all by Publisher and Subscriber."""

from __future__ import annotations

import functools
from typing import Any

import gevent
import zerorpc
import zmq
from peer import Target, host_and_port, obey_beside, say

from peers.roles import listening_on, run_blocking


class Service(Target):
    """The object whose methods are called from afar; it also says where it receives what has no answer."""

    pull_port = 0

    def where(self) -> int:
        return self.pull_port


def serve(endpoint: str) -> None:
    host, port = listening_on(endpoint)
    service = Service()
    server = zerorpc.Server(service)
    server.bind(f"tcp://{host}:{port}")
    _, service.pull_port = listening_on(endpoint)
    puller = zerorpc.Puller(service)
    puller.bind(f"tcp://{host}:{service.pull_port}")
    say(endpoint=f"tcp://{host}:{port}")
    obey_beside()
    gevent.joinall([gevent.spawn(puller.run), gevent.spawn(server.run)])


class Answer:
    """What zerorpc calls an asynchronous result, with the name that a future has for it."""

    def __init__(self, pending: Any) -> None:
        self.result = pending.get


class Connected:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client = zerorpc.Client(endpoint, timeout=30)
        self.call = functools.partial(self.client, "echo")
        self.pusher: Any = None

    def submit(self, payload: bytes) -> Answer:
        return Answer(self.client("echo", payload, **{"async": True}))

    def cast(self, payload: bytes) -> None:
        self.pusher("tick", payload)

    def finish(self) -> tuple[int, int]:
        if self.pusher is None:
            self.pusher = zerorpc.Pusher()
            host, _ = host_and_port(self.endpoint)
            self.pusher.connect(f"tcp://{host}:{self.client('where')}")
        handled, last = self.client("finish")
        return handled, last

    def close(self) -> None:
        self.client.close()


if __name__ == "__main__":
    zmq.Context.instance().set(zmq.MAX_SOCKETS, 4096)
    run_blocking(serve, Connected, "zerorpc", "gevent", "pyzmq", "msgpack")
