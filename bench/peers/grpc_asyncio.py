"""gRPC on asyncio: bytes without protobuf; one way by a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from peer import Target, host_and_port, obey_beside, say

from peers.grpc_threads import OPTIONS
from peers.roles import run_coroutines


async def serve(endpoint: str) -> None:
    target = Target()

    async def echo(payload: bytes, _context: Any) -> bytes:
        return payload

    async def ticks(payloads: AsyncIterator[bytes], _context: Any) -> bytes:
        async for payload in payloads:
            target.tick(payload)
        return b""

    async def finish(_payload: bytes, _context: Any) -> bytes:
        return "{} {}".format(*target.finish()).encode()

    handlers = {
        "echo": grpc.unary_unary_rpc_method_handler(echo),
        "ticks": grpc.stream_unary_rpc_method_handler(ticks),
        "finish": grpc.unary_unary_rpc_method_handler(finish),
    }
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    port = server.add_insecure_port(f"{host}:0")
    await server.start()
    say(endpoint=f"tcp://{host}:{port}")
    obey_beside()
    await asyncio.Event().wait()


class Connected:
    def __init__(self, endpoint: str) -> None:
        host, port = host_and_port(endpoint)
        self.channel = grpc.aio.insecure_channel(f"{host}:{port}", options=OPTIONS)
        self.echo = self.channel.unary_unary("/bench/echo")
        self.ticks = self.channel.stream_unary("/bench/ticks")
        self.stream: Any = None

    async def call(self, payload: bytes) -> bytes:
        answer: bytes = await self.echo(payload)
        return answer

    async def cast(self, payload: bytes) -> None:
        if self.stream is None:
            self.stream = self.ticks()
        await self.stream.write(payload)

    async def finish(self) -> tuple[int, int]:
        if self.stream is not None:
            await self.stream.done_writing()
            await self.stream
            self.stream = None
        handled, last = (await self.channel.unary_unary("/bench/finish")(b"")).split()
        return int(handled), int(last)

    async def close(self) -> None:
        await self.channel.close()


async def connect(endpoint: str) -> Connected:
    return Connected(endpoint)


if __name__ == "__main__":
    run_coroutines(serve, connect, "grpcio")
