"""The two roles that each program in this package can be started in.

``python -m peers.NAME server ENDPOINT`` and ``python -m peers.NAME client ENDPOINT...``, with ``bench/`` on the path,
speak the line protocol of ``peer.py``. A peer is what serves and what connects; everything else is here: for a peer
whose calls block :func:`run_blocking`, for one on an event loop :func:`run_coroutines`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

import uvloop
from peer import (
    Call,
    Connection,
    Task,
    WrongAnswer,
    addresses,
    call_figures,
    cast_figures,
    connection_tasks,
    cpu_seconds,
    die_with_parent,
    inflight_figures,
    leave,
    measure_inflight,
    measure_threads,
    obey,
    payload_maker,
    same,
    say,
    warmup_seconds,
)


def listening_on(endpoint: str) -> tuple[str, int]:
    """Return the host and a port that is free, of an endpoint that leaves the port open: ``tcp://host:*``."""
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    with socket.socket() as probe:
        probe.bind((host, 0))
        return host, int(probe.getsockname()[1])


def _versions(distributions: Sequence[str]) -> dict[str, str]:
    """Return the versions of what is installed, and of what is imported from the checkout."""
    checkout = {"zmqcore": sys.modules["zmqcore"].__version__} if "zmqcore" in sys.modules else {}
    return checkout | {name: importlib.metadata.version(name) for name in distributions}


# -- peers whose calls block -----------------------------------------------------------------------------


class Blocking(Connection, Protocol):
    """A connection, and a way to have many calls outstanding: ``submit`` is None where only threads can."""

    submit: Callable[[bytes], Any] | None


def run_blocking(
    serve: Callable[[str], None],
    connect: Callable[[str], Blocking],
    *distributions: str,
    to_all: Callable[[Sequence[Any]], Call] | None = None,
) -> None:
    """Serve, or connect and run the tasks that the input names. ``serve`` says where, and does not return.

    ``to_all(connections)`` gives the function that sends a payload to all of them, if there is a better way than one
    after the other.
    """
    role, *endpoints = sys.argv[1:]
    die_with_parent()
    if role == "server":
        serve(endpoints[0])
    else:
        _run_client(connect, endpoints, distributions, to_all)
    leave()


def _run_client(
    connect: Callable[[str], Blocking],
    endpoints: list[str],
    distributions: Sequence[str],
    to_all: Callable[[Sequence[Any]], Call] | None,
) -> None:
    client = connect(endpoints[0])

    def inflight(size: int, seconds: float, depth: int) -> dict[str, Any]:
        if client.submit is not None:
            return measure_inflight(client.submit, size, seconds, depth)
        return measure_threads(lambda: connect(endpoints[0]).call, size, depth, seconds=seconds)

    tasks: dict[str, Task] = {
        "inflight": inflight,
        **connection_tasks(client, connect, endpoints, to_all=to_all),
    }
    client.finish()  # connected
    say(versions=_versions(distributions))
    obey(tasks)


# -- peers on an event loop ------------------------------------------------------------------------------


class Asynchronous(Protocol):
    """What a peer on an event loop does on one connection."""

    async def call(self, payload: bytes, /) -> Any: ...
    async def cast(self, payload: bytes, /) -> object: ...
    async def finish(self) -> tuple[int, int]: ...
    async def close(self) -> object: ...


AsyncCall = Callable[[bytes], Awaitable[Any]]
Connect = Callable[[str], Awaitable[Asynchronous]]
AsyncTask = Callable[[int, float, int], Awaitable[dict[str, Any]]]


async def _checked(call: AsyncCall, payload: bytes) -> None:
    answer = await call(payload)
    if not same(answer, payload):
        raise WrongAnswer(f"sent {payload[:32]!r}, got {bytes(answer[:32])!r}")


async def measure_awaited_calls(call: AsyncCall, size: int, seconds: float) -> dict[str, Any]:
    payload_of, clock = payload_maker(size), time.perf_counter_ns
    cpu = cpu_seconds()
    number = 0
    end = clock() + int(warmup_seconds(seconds) * 1e9)
    while not number or clock() < end:
        await _checked(call, payload_of(number))
        number += 1
    durations_ns = []
    begin = last = clock()
    end = begin + int(seconds * 1e9)
    while last < end:
        await _checked(call, payload_of(number))
        number += 1
        now = clock()
        durations_ns.append(now - last)
        last = now
    return call_figures(durations_ns, len(durations_ns) * 1e9 / (last - begin), number, cpu_seconds() - cpu)


async def measure_tasks(call: AsyncCall, size: int, seconds: float, depth: int) -> dict[str, Any]:
    """Let ``depth`` tasks call, one call after the other each."""
    payload_of = payload_maker(size)
    calls = 0

    async def work(number: int) -> None:
        nonlocal calls
        while time.perf_counter_ns() < end:
            await _checked(call, payload_of(number))
            number += 1
            calls += 1

    cpu = cpu_seconds()
    begin = time.perf_counter_ns()
    end = begin + int(seconds * 1e9)
    async with asyncio.TaskGroup() as group:
        for index in range(depth):
            group.create_task(work(index << 32))
    return inflight_figures(calls, time.perf_counter_ns() - begin, cpu_seconds() - cpu)


async def _finish_all(connections: Sequence[Asynchronous]) -> tuple[int, int]:
    answers = [await connection.finish() for connection in connections]
    return sum(handled for handled, _ in answers), max(last for _, last in answers)


async def measure_awaited_casts(
    cast: AsyncCall, receivers: Sequence[Asynchronous], size: int, seconds: float
) -> dict[str, Any]:
    """Send one way; each ``cast()`` reaches all ``receivers``. As ``peer.measure_casts``."""
    payload = payload_maker(size)(0)
    clock = time.monotonic_ns
    await _finish_all(receivers)  # connected
    cpu = cpu_seconds()
    sent = 0
    begin = clock()
    end = begin + int(seconds * 1e9)
    while clock() < end:
        for _ in range(128):
            await cast(payload)
        sent += 128 * len(receivers)
    handed_over = clock()
    handled, last = await _finish_all(receivers)
    deadline = handed_over + 30_000_000_000
    while handled < sent and clock() < deadline:
        await asyncio.sleep(0.001)
        more, last = await _finish_all(receivers)
        handled += more
    return cast_figures(sent, handled, begin, handed_over, last, cpu_seconds() - cpu)


class Client:
    """The tasks of a peer on an event loop; it may replace some (see ``tasks``)."""

    def __init__(self, connect: Connect, endpoints: list[str]) -> None:
        self.connect = connect
        self.endpoints = endpoints
        self.kept: list[Asynchronous] = []

    async def start(self) -> None:
        """Connect to the first endpoint."""
        self.first = await self.connect(self.endpoints[0])
        await self.first.finish()

    def tasks(self) -> dict[str, AsyncTask]:
        """Return what is run for each command."""
        return {
            "call": lambda size, seconds, _: measure_awaited_calls(self.first.call, size, seconds),
            "inflight": lambda size, seconds, depth: measure_tasks(self.first.call, size, seconds, depth),
            "cast": lambda size, seconds, _: measure_awaited_casts(
                self.first.cast, [self.first], size, seconds
            ),
            "fanout": self.fanout,
            "open": self.open,
            "kept": self.call_kept,
            "shut": self.shut,
            "new": self.call_new,
        }

    async def fanout(self, size: int, seconds: float, _: int) -> dict[str, Any]:
        connections = [await self.connect(endpoint) for endpoint in self.endpoints]
        return await measure_awaited_casts(self.to_all(connections), connections, size, seconds)

    def to_all(self, connections: list[Any]) -> AsyncCall:
        """Return what sends one payload to all: here one after the other."""

        async def cast(payload: bytes) -> None:
            for connection in connections:
                await connection.cast(payload)

        return cast

    async def open(self, size: int, _: float, count: int) -> dict[str, Any]:
        payload = payload_maker(size)(0)
        begin = time.perf_counter()
        for endpoint in addresses(self.endpoints[0], count):
            self.kept.append(await self.connect(endpoint))
            await _checked(self.kept[-1].call, payload)
        return {"open": len(self.kept), "seconds": time.perf_counter() - begin}

    async def call_kept(self, size: int, seconds: float, _: int) -> dict[str, Any]:
        calls = itertools.cycle([connection.call for connection in self.kept])

        def call(payload: bytes) -> Awaitable[Any]:
            return next(calls)(payload)

        return await measure_awaited_calls(call, size, seconds)

    async def shut(self, *_: object) -> dict[str, Any]:
        for connection in self.kept:
            await connection.close()
        self.kept.clear()
        return {}

    async def connect_once(self, endpoint: str) -> Asynchronous:
        """Connect for a single call."""
        return await self.connect(endpoint)

    async def call_new(self, size: int, seconds: float, count: int) -> dict[str, Any]:
        turns = itertools.cycle(addresses(self.endpoints[0], count))

        async def call(payload: bytes) -> Any:
            connection = await self.connect_once(next(turns))
            answer = await connection.call(payload)
            await connection.close()
            return answer

        return await measure_awaited_calls(call, size, seconds)


def run_coroutines(
    serve: Callable[[str], Coroutine[Any, Any, None]],
    connect: Connect,
    *distributions: str,
    client_type: type[Client] = Client,
) -> None:
    """As :func:`run_blocking`, on uvloop."""
    role, *endpoints = sys.argv[1:]
    die_with_parent()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if role == "server":
            runner.run(serve(endpoints[0]))
        else:
            runner.run(_obey(client_type(connect, endpoints), distributions))
        leave()


async def _obey(client: Client, distributions: Sequence[str]) -> None:
    """Run commands until the input ends; the loop goes on while it waits for the next one."""
    await client.start()
    say(versions=_versions([*distributions, "uvloop"]))
    tasks = client.tasks()
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, size, seconds, *extra = line.split()
        try:
            say(**await tasks[name](int(size), float(seconds), int(extra[0]) if extra else 0))
        except BaseException as failure:
            say(error=f"{type(failure).__name__}: {failure}")
            raise
