"""zmqcore itself, as a process that is measured: calls, casts, futures and coroutines through the public API.

``python peers_zmqcore.py server|client ENDPOINT... [--workers N] [--spin SECONDS] [--cpu N]`` speaks the line protocol
of ``peer.py``. The client is told where the server listens (``connect=``), so no registry takes part. Besides, a client
knows ``asyncio SIZE SECONDS DEPTH`` and ``uvloop SIZE SECONDS DEPTH``: DEPTH coroutines, each with one call after the
other.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq
from peer import (
    Target,
    Task,
    WrongAnswer,
    connection_tasks,
    cpu_seconds,
    die_with_parent,
    inflight_figures,
    leave,
    measure_casts,
    measure_inflight,
    measure_threads,
    obey,
    payload_maker,
    same,
    say,
)

from zmqcore import AsyncClient, Client, Node, Server, __version__, _frame
from zmqcore.codec import get_codec

TOPIC = "bench"
SOCKETS_OF_THE_FRUGAL = 1
"""Budget of the node that makes a connection for each call: the next one throws out the last one's."""
TIMEOUT = 10.0
"""Deadline of each call: far above what one takes, so that a lost wake-up is an error and not a slow call."""


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
    return inflight_figures(calls, time.perf_counter_ns() - begin, cpu_seconds() - cpu)


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


class Connected:
    """A client of one server."""

    def __init__(self, node: Node, endpoint: str) -> None:
        client = Client(TOPIC, node=node, connect=endpoint, timeout=TIMEOUT)
        self.call = functools.partial(client.call, "echo")
        self.cast = functools.partial(client.cast, "tick")
        self.submit = functools.partial(client.submit, "echo")
        self.finish = functools.partial(client.call, "finish")

    def close(self) -> None:
        """Do nothing: connections belong to the node's pool."""


def versions() -> dict[str, str]:
    """Return the versions of zmqcore and of what it stands on."""
    return {
        "zmqcore": __version__,
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
        "msgpack": ".".join(map(str, msgpack.version)),
    }


def run_client(node: Node, endpoints: list[str]) -> None:
    """Connect, and run the tasks that the input names."""
    endpoint = endpoints[0]
    client = Connected(node, endpoint)
    call = client.call
    frugal = Node("memory://bench", max_sockets=SOCKETS_OF_THE_FRUGAL)

    def fanout(size: int, seconds: float, _: int) -> dict[str, Any]:
        everyone = Client(TOPIC, node=node, connect=endpoints, timeout=TIMEOUT)

        def finish() -> tuple[int, int]:
            results = everyone.gather("finish").results.values()
            return sum(handled for handled, _ in results), max(last for _, last in results)

        finish()  # connected
        to_all = functools.partial(everyone.fanout, "tick")
        return measure_casts(to_all, finish, size, seconds, len(endpoints))

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
        "inflight": lambda size, seconds, depth: measure_inflight(client.submit, size, seconds, depth),
        "threads": threads,
        "soak": soak,
        "pack": lambda size, seconds, _: measure_pack(size, seconds),
        **connection_tasks(
            client,
            functools.partial(Connected, node),
            endpoints,
            connect_once=functools.partial(Connected, frugal),
        ),
        "fanout": fanout,
    }
    client.finish()  # connected before anything is measured, as the others are after their warm-up
    say(versions=versions())
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
    parser.add_argument("endpoint", nargs="+")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--spin", type=float, help="yield-spin in seconds (default: the node's own)")
    parser.add_argument("--cpu", type=int, help="run on this CPU alone, where that can be asked for (Linux)")
    options = parser.parse_args()
    if options.cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.cpu})
    die_with_parent()
    settings = {} if options.spin is None else {"spin": options.spin}
    node = Node("memory://bench", **settings)
    if options.role == "server":
        run_server(node, options.endpoint[0], options.workers)
    else:
        run_client(node, options.endpoint)
    leave()


if __name__ == "__main__":
    main()
