"""nats-py through a nats-server: requests, and messages one way and to all by publishing.

The endpoint is that of the server and a name for the group: ``nats://host:port/group``. Each process that answers adds
a name of its own.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import nats
from peer import Target, obey_beside, say

from peers.roles import AsyncCall, Client, run_coroutines

TIMEOUT = 30.0


async def serve(endpoint: str) -> None:
    url, _, group = endpoint.rpartition("/")
    me = f"{group}.{os.getpid()}"
    target = Target()
    connection = await nats.connect(url)

    async def echo(message: Any) -> None:
        await message.respond(message.data)

    async def tick(message: Any) -> None:
        target.tick(message.data)

    async def finish(message: Any) -> None:
        await message.respond("{} {}".format(*target.finish()).encode())

    # Without limits nothing is dropped: what is sent too fast waits in memory.
    unlimited: dict[str, Any] = {"pending_msgs_limit": 0, "pending_bytes_limit": 0}
    await connection.subscribe(f"{me}.echo", cb=echo, **unlimited)
    await connection.subscribe(f"{me}.tick", cb=tick, **unlimited)
    await connection.subscribe(f"{group}.all", cb=tick, **unlimited)
    await connection.subscribe(f"{me}.finish", cb=finish, **unlimited)
    await connection.flush()
    say(endpoint=f"{endpoint}/{me}")
    obey_beside()
    await asyncio.Event().wait()


class Connected:
    def __init__(self, connection: Any, group: str, server: str) -> None:
        self.connection = connection
        self.group = group
        self.server = server

    async def call(self, payload: bytes) -> bytes:
        data: bytes = (await self.connection.request(f"{self.server}.echo", payload, timeout=TIMEOUT)).data
        return data

    async def cast(self, payload: bytes) -> None:
        await self.connection.publish(f"{self.server}.tick", payload)

    async def publish(self, payload: bytes) -> None:
        await self.connection.publish(f"{self.group}.all", payload)

    async def finish(self) -> tuple[int, int]:
        answer = await self.connection.request(f"{self.server}.finish", b"", timeout=TIMEOUT)
        handled, last = answer.data.split()
        return int(handled), int(last)

    async def close(self) -> None:
        await self.connection.close()


async def connect(endpoint: str) -> Connected:
    url, group, server = endpoint.rsplit("/", 2)
    return Connected(await nats.connect(url), group, server)


class Publishing(Client):
    """One message to the broker reaches all."""

    def to_all(self, connections: list[Any]) -> AsyncCall:
        publish: AsyncCall = connections[0].publish
        return publish


if __name__ == "__main__":
    run_coroutines(serve, connect, "nats-py", client_type=Publishing)
