"""zeroapi over its TCP protocol, one worker process; it has calls only, one at a time on each connection."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable
from typing import Any

from peer import die_with_parent, host_and_port, leave, obey_beside, say
from zero import AsyncZeroClient, ZeroServer
from zero.protocols.tcp import AsyncTCPClient, TCPServer

from peers.roles import AsyncTask, Client, listening_on, measure_tasks, run_coroutines

TIMEOUT_MS = 30_000


def echo(payload: bytes) -> bytes:
    return payload


def say_when_listening(host: str, port: int) -> None:
    """Say where the server is as soon as its worker takes connections."""
    while True:
        try:
            socket.create_connection((host, port)).close()
            break
        except OSError:
            time.sleep(0.01)
    say(endpoint=f"tcp://{host}:{port}")
    obey_beside()


def serve(endpoint: str) -> None:
    logging.disable()
    host, port = listening_on(endpoint)
    server = ZeroServer(host=host, port=port, protocol=TCPServer)
    server.register_rpc(echo)
    # Its worker is a forked child. A thread of ours that runs before might leave it a lock that is never released.
    waiter = threading.Thread(target=say_when_listening, args=(host, port), daemon=True)
    os.register_at_fork(after_in_child=die_with_parent, after_in_parent=waiter.start)
    server.run(workers=1)


class Connected:
    def __init__(self, endpoint: str, connections: int = 1) -> None:
        host, port = host_and_port(endpoint)
        self.client = AsyncZeroClient(
            host, port, default_timeout=TIMEOUT_MS, protocol=AsyncTCPClient, pool_size=connections
        )

    def call(self, payload: bytes) -> Awaitable[Any]:
        return self.client.call("echo", payload)

    async def close(self) -> None:
        self.client.close()


async def connect(endpoint: str) -> Any:
    return Connected(endpoint)


class Calling(Client):
    """It can neither tell nor count; what is in flight needs a connection each."""

    async def start(self) -> None:
        self.first = await self.connect(self.endpoints[0])
        await self.first.call(b"connected")

    def tasks(self) -> dict[str, AsyncTask]:
        return super().tasks() | {"inflight": self.inflight}

    async def inflight(self, size: int, seconds: float, depth: int) -> dict[str, Any]:
        many = Connected(self.endpoints[0], depth)
        await many.call(b"connected")
        return await measure_tasks(many.call, size, seconds, depth)


if __name__ == "__main__":
    if sys.argv[1] == "server":
        die_with_parent()
        serve(sys.argv[2])
        leave()
    run_coroutines(None, connect, "zeroapi", client_type=Calling)
