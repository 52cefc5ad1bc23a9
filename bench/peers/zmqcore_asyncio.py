"""zmqcore on asyncio: an AsyncServer whose handlers are coroutines, and an AsyncClient."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from peer import Target, obey_beside, say

from peers.roles import AsyncCall, Client, run_coroutines
from zmqcore import AsyncClient, AsyncServer, Node

TOPIC = "bench"
TIMEOUT = 10.0


class Service:
    """The coroutines that are called from afar."""

    def __init__(self) -> None:
        self.target = Target()

    async def echo(self, payload: Any) -> Any:
        return payload

    async def tick(self, payload: Any) -> None:
        self.target.tick(payload)

    async def finish(self) -> tuple[int, int]:
        return self.target.finish()


async def serve(endpoint: str) -> None:
    async with AsyncServer(TOPIC, Service(), node=Node("memory://bench"), bind=endpoint) as server:
        say(endpoint=server.endpoints[0])
        obey_beside()
        await asyncio.Event().wait()


class Connected:
    def __init__(self, node: Node, *endpoints: str) -> None:
        self.endpoints = endpoints
        client = AsyncClient(TOPIC, node=node, connect=endpoints, timeout=TIMEOUT)
        self.call = functools.partial(client.call, "echo")
        self.cast = functools.partial(client.cast, "tick")
        self.cast_to_all = functools.partial(client.fanout, "tick")
        self._finish = functools.partial(client.call, "finish")

    async def finish(self) -> tuple[int, int]:
        handled, last = await self._finish()
        return handled, last

    async def close(self) -> None:
        """Do nothing: connections belong to the node's pool."""


node = Node("memory://bench", max_sockets=600)
frugal = Node("memory://bench", max_sockets=1)


async def connect(endpoint: str) -> Connected:
    return Connected(node, endpoint)


class Pooled(Client):
    """The pool does the connecting: with room for one socket it connects for each call."""

    def to_all(self, _connections: list[Any]) -> AsyncCall:
        return Connected(node, *self.endpoints).cast_to_all

    async def connect_once(self, endpoint: str) -> Connected:
        return Connected(frugal, endpoint)


if __name__ == "__main__":
    run_coroutines(serve, connect, "pyzmq", "msgpack", client_type=Pooled)
