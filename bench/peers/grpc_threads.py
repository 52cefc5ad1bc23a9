"""gRPC with threads: bytes without protobuf; in flight by futures, one way by a stream."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from peer import Target, host_and_port, leave, obey, say

from peers.roles import run_blocking

OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each channel
]
WORKERS = 8
UNSENT = 256
"""Messages that may wait for the stream: without a bound they would pile up in memory."""


def serve(endpoint: str) -> None:
    target = Target()

    def ticks(payloads: Iterator[bytes], _context: Any) -> bytes:
        for payload in payloads:
            target.tick(payload)
        return b""

    def finish(_payload: bytes, _context: Any) -> bytes:
        return "{} {}".format(*target.finish()).encode()

    handlers = {
        "echo": grpc.unary_unary_rpc_method_handler(lambda payload, _context: payload),
        "ticks": grpc.stream_unary_rpc_method_handler(ticks),
        "finish": grpc.unary_unary_rpc_method_handler(finish),
    }
    server = grpc.server(ThreadPoolExecutor(WORKERS), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    say(endpoint=f"tcp://{host}:{port}")
    obey({})
    leave()


class Connected:
    def __init__(self, endpoint: str) -> None:
        host, port = host_and_port(endpoint)
        self.channel = grpc.insecure_channel(f"{host}:{port}", options=OPTIONS)
        echo = self.channel.unary_unary("/bench/echo")
        self.call, self.submit = echo, echo.future
        self._finish = self.channel.unary_unary("/bench/finish")
        self.unsent: queue.Queue[bytes] | None = None

    def cast(self, payload: bytes) -> None:
        if self.unsent is None:
            self.unsent = queue.Queue(UNSENT)
            self.stream = self.channel.stream_unary("/bench/ticks").future(iter(self.unsent.get, b""))
        self.unsent.put(payload)

    def finish(self) -> tuple[int, int]:
        if self.unsent is not None:
            self.unsent.put(b"")  # ends the stream
            self.stream.result()
            self.unsent = None
        handled, last = self._finish(b"").split()
        return int(handled), int(last)

    def close(self) -> None:
        self.channel.close()


if __name__ == "__main__":
    run_blocking(serve, Connected, "grpcio")
