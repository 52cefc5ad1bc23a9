"""zmqcore itself, as a process that is measured: calls, casts, futures and coroutines through the public API.

``python peers_zmqcore.py server|client ENDPOINT [--workers N] [--spin SECONDS]`` speaks the line protocol of
``peer.py``. The client is told where the server listens (``connect=``), so no registry takes part. Besides, a client
knows ``asyncio SIZE SECONDS DEPTH`` and ``uvloop SIZE SECONDS DEPTH``: DEPTH coroutines, each with one call after the
other.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import importlib
import time
from collections.abc import Callable
from typing import Any

from peer import (
    Task,
    WrongAnswer,
    cpu_seconds,
    die_with_parent,
    leave,
    measure_calls,
    measure_casts,
    measure_threads,
    obey,
    payload_maker,
    same,
    say,
)

from zmqcore import AsyncClient, Client, Node, Server, _frame
from zmqcore.codec import get_codec

TOPIC = "bench"
TIMEOUT = 10.0
"""Deadline of each call: far above what one takes, so that a lost wake-up is an error and not a slow call."""


class Target:
    """The object whose methods are called from afar."""

    def __init__(self) -> None:
        self.handled = 0

    def echo(self, payload: Any) -> Any:
        return payload

    def tick(self, _payload: Any) -> None:
        self.handled += 1

    def finish(self) -> tuple[int, int]:
        handled, self.handled = self.handled, 0
        return handled, time.monotonic_ns()


def measure_inflight(client: Client, size: int, seconds: float, depth: int) -> dict[str, Any]:
    """Keep ``depth`` futures outstanding."""
    submit, payload_of = client.submit, payload_maker(size)
    outstanding: collections.deque[tuple[Any, bytes]] = collections.deque()
    cpu = cpu_seconds()
    begin = now = time.perf_counter_ns()
    end = begin + int(seconds * 1e9)
    number = 0
    while outstanding or now < end:
        while len(outstanding) < depth and now < end:
            number += 1
            payload = payload_of(number)
            outstanding.append((submit("echo", payload), payload))
        future, payload = outstanding.popleft()
        answer = future.result()
        if not same(answer, payload):
            raise WrongAnswer(f"sent {payload[:32]!r}, got {bytes(answer[:32])!r}")
        if not number & 15:
            now = time.perf_counter_ns()
    elapsed = time.perf_counter_ns() - begin
    return {"calls": number, "rate": number * 1e9 / elapsed, "total": number, "cpu": cpu_seconds() - cpu}


async def measure_coroutines(client: AsyncClient, size: int, seconds: float, depth: int) -> dict[str, Any]:
    """Let ``depth`` coroutines call, one call after the other each."""
    payload_of = payload_maker(size)
    calls = 0

    async def work(number: int) -> None:
        nonlocal calls
        while time.perf_counter_ns() < end:
            for _ in range(16):
                number += 1
                payload = payload_of(number)
                answer = await client.call("echo", payload)
                if not same(answer, payload):
                    raise WrongAnswer(f"sent {payload[:32]!r}, got {bytes(answer[:32])!r}")
            calls += 16

    await client.call("finish")  # the loop has its channel
    cpu = cpu_seconds()
    begin = time.perf_counter_ns()
    end = begin + int(seconds * 1e9)
    async with asyncio.TaskGroup() as group:
        for index in range(depth):
            group.create_task(work(index << 32))
    elapsed = time.perf_counter_ns() - begin
    return {"calls": calls, "rate": calls * 1e9 / elapsed, "total": calls, "cpu": cpu_seconds() - cpu}


def measure_pack(size: int, seconds: float) -> dict[str, Any]:
    """Time what lies between the arguments here and the arguments there, without I/O, in blocks of 1000.

    It goes through the envelope's Python face, which makes ``bytes`` where a channel fills libzmq's memory: a
    little more than what a call spends.
    """
    codec, payload = get_codec("msgpack"), payload_maker(size)(0)
    pack, parse = _frame.pack, _frame.Envelope.parse
    blocks_ns: list[int] = []
    cpu = cpu_seconds()
    end = time.perf_counter_ns() + int(seconds * 1e9)
    last = 0
    while last < end:
        begin = time.perf_counter_ns()
        for number in range(1000):
            buffers: list[Any] = []
            body = codec.encode(((payload,), {}), buffers)
            parts = pack(
                "call", id=number, topic=b"bench", method="echo", body=body, codec=1, remaining_ms=5000
            )
            envelope = parse(parts)
            method, value = envelope.method, codec.decode(envelope.body, envelope.buffers)
        last = time.perf_counter_ns()
        blocks_ns.append(last - begin)
    if method != "echo" or value != [[payload], {}]:
        raise WrongAnswer(f"packed echo({payload!r}), unpacked {method} {value!r}")
    calls = len(blocks_ns) * 1000
    p50_us = sorted(blocks_ns)[len(blocks_ns) // 2] / 1e6
    return {
        "calls": calls,
        "rate": 1e6 / p50_us,
        "p50_us": p50_us,
        "total": calls,
        "cpu": cpu_seconds() - cpu,
    }


def run_client(node: Node, endpoint: str) -> None:
    """Connect, and run the tasks that the input names."""
    client = Client(TOPIC, node=node, connect=endpoint, timeout=TIMEOUT)

    def call(payload: bytes) -> Any:
        return client.call("echo", payload)

    def cast(payload: bytes) -> None:
        client.cast("tick", payload)

    def finish() -> tuple[int, int]:
        handled, last = client.call("finish")
        return handled, last

    def threads(size: int, seconds: float, count: int) -> dict[str, Any]:
        return measure_threads(lambda: call, size, count, seconds=seconds)

    def soak(size: int, calls: float, count: int) -> dict[str, Any]:
        return measure_threads(lambda: call, size, count, calls=int(calls))

    def coroutines(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> Task:
        def measure(size: int, seconds: float, depth: int) -> dict[str, Any]:
            with asyncio.Runner(loop_factory=make_loop) as runner:
                asynchronous = AsyncClient(TOPIC, node=node, connect=endpoint, timeout=TIMEOUT)
                return runner.run(measure_coroutines(asynchronous, size, seconds, depth))

        return measure

    def uvloop() -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
        return loop

    tasks: dict[str, Task] = {
        "asyncio": coroutines(asyncio.new_event_loop),
        "uvloop": coroutines(uvloop),
        "call": lambda size, seconds, _: measure_calls(call, size, seconds),
        "cast": lambda size, seconds, _: measure_casts(cast, finish, size, seconds),
        "inflight": lambda size, seconds, depth: measure_inflight(client, size, seconds, depth),
        "threads": threads,
        "soak": soak,
        "pack": lambda size, seconds, _: measure_pack(size, seconds),
    }
    client.call("finish")  # connected before anything is measured, as the others are after their warm-up
    say(ready=True)
    obey(tasks)


def run_server(node: Node, endpoint: str, workers: int) -> None:
    """Bind, say where, and serve until the input ends."""
    server = Server(TOPIC, Target(), node=node, workers=workers, bind=endpoint)
    server.start()
    say(endpoint=server.endpoints[0])
    obey({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["server", "client"])
    parser.add_argument("endpoint")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--spin", type=float, help="yield-spin in seconds (default: the node's own)")
    options = parser.parse_args()
    die_with_parent()
    settings = {} if options.spin is None else {"spin": options.spin}
    node = Node("memory://bench", **settings)
    if options.role == "server":
        run_server(node, options.endpoint, options.workers)
    else:
        run_client(node, options.endpoint)
    leave()


if __name__ == "__main__":
    main()
