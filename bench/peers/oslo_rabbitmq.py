"""oslo.messaging's RPC through RabbitMQ, transient queues; in flight by threads. Its values are JSON: text, not bytes.

The endpoint is the transport's URL with the topic as its last part: ``rabbit://user:password@host:port/topic``. Each
server adds a name of its own.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import oslo_messaging
from oslo_config import cfg
from peer import Target, leave, obey, say

from peers.roles import run_blocking

TIMEOUT = 30


def open_transport(url: str) -> Any:
    """Return a transport for RPC with room for 100 threads."""
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=f"{url}/")  # a part of it looks nowhere else
    cfg.CONF.set_override("rpc_conn_pool_size", 128, group="oslo_messaging_rabbit")
    return transport


def serve(endpoint: str) -> None:
    url, _, topic = endpoint.rpartition("/")
    me = str(os.getpid())

    class Service(Target):
        """The methods that are called from afar; each gets the request's context first."""

        def echo(self, _context: Any, payload: str) -> str:
            return payload

        def tick(self, _context: Any, payload: str) -> None:
            super().tick(payload)

        def finish(self, _context: Any) -> tuple[int, int]:
            return super().finish()

    server = oslo_messaging.get_rpc_server(
        open_transport(url), oslo_messaging.Target(topic=topic, server=me), [Service()], executor="threading"
    )
    server.start()
    say(endpoint=f"{endpoint}/{me}")
    obey({})
    leave()


class Connected:
    submit = None

    def __init__(self, endpoint: str) -> None:
        url, topic, server = endpoint.rsplit("/", 2)
        self.transport = open_transport(url)
        client = oslo_messaging.get_rpc_client(self.transport, oslo_messaging.Target(topic=topic))
        self.one, self.all = client.prepare(server=server, timeout=TIMEOUT), client.prepare(fanout=True)

    def call(self, payload: bytes) -> bytes:
        answer: str = self.one.call({}, "echo", payload=payload.decode("latin-1"))
        return answer.encode("latin-1")

    def cast(self, payload: bytes) -> None:
        self.one.cast({}, "tick", payload=payload.decode("latin-1"))

    def cast_to_all(self, payload: bytes) -> None:
        self.all.cast({}, "tick", payload=payload.decode("latin-1"))

    def finish(self) -> tuple[int, int]:
        handled, last = self.one.call({}, "finish")
        return handled, last

    def close(self) -> None:
        self.transport.cleanup()


if __name__ == "__main__":
    logging.disable()
    cfg.CONF([])
    run_blocking(
        serve,
        Connected,
        "oslo.messaging",
        "kombu",
        "amqp",
        to_all=lambda connections: connections[0].cast_to_all,
    )
