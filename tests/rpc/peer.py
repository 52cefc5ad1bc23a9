"""A server in a process of its own: ``peer.py OPTIONS``, a JSON map.

Serves a Worker (with ``"async": true`` an AsyncWorker by an AsyncServer), says where, then obeys its stdin, a JSON list
per line, and answers each by a line of JSON: ``["stop", drain, timeout]``, ``["stats"]``, ``["start"]``. At the end of
stdin it ends without a word to anybody.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from memory_support import peak_rss_bytes

from zmqcore import AsyncClient, AsyncServer, Client, Node, Server, Topic
from zmqcore.rpc import deadline


class Worker:
    """What tests call."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._name = ""
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def who(self) -> str:
        return self._name

    def pid(self) -> int:
        return os.getpid()

    def echo(self, value: Any = None) -> Any:
        return value

    def describe(self, value: Any) -> list[Any]:
        """What a buffer has come as: type, format, number of items and bytes."""
        view = memoryview(value)
        return [type(value).__name__, view.format, len(view), view.tobytes()]

    def add(self, a: int, b: int = 1) -> int:
        return a + b

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return self._name

    def hold_the_gil(self, seconds: float) -> str:
        """Sleep in a C call that does not release the GIL: no other Python code of this process runs meanwhile."""
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        return "held"

    def count(self, key: str, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + 1

    def count_in(self, server: str, seconds: float) -> str:
        """Count, and take so long, if this is ``server``."""
        if server == self._name:
            self.count(server)
            time.sleep(seconds)
        return self._name

    def counted(self, key: str) -> int:
        return self._counts.get(key, 0)

    def remaining(self) -> float | None:
        return deadline.time_left()

    def relay(self, seconds: float, topics: list[str], method: str, *args: Any) -> Any:
        """Sleep, then have the next topic do the same; the last one runs ``method``."""
        time.sleep(seconds)
        with Client(topics[0], node=self._node, timeout=60.0) as client:
            if len(topics) == 1:
                return client.call(method, *args)
            return client.call("relay", seconds, topics[1:], method, *args)

    def numbers(self, n: int, size: int = 0) -> Iterator[Any]:
        """Yield n numbers or, with a size, as many arrays of that many bytes."""
        try:
            for number in range(n):
                self._counts["produced"] = self._counts.get("produced", 0) + 1
                yield bytes(size) if size else number
        finally:
            self._counts["closed"] = self._counts.get("closed", 0) + 1

    def fails_after(self, n: int) -> Iterator[int]:
        yield from range(n)
        raise LookupError(f"after {n}")

    def slowly(self, seconds: float) -> Iterator[int]:
        for number in range(1000):
            time.sleep(seconds)
            yield number

    def max_rss(self) -> int:
        """In bytes."""
        return peak_rss_bytes()

    def write(self, path: str, text: str) -> None:
        Path(path).write_text(text)


class AsyncWorker(Worker):
    """The same, where it waits by coroutines. ``echo`` and what else is inherited are plain functions."""

    _gate = asyncio.Event()

    async def sleep(self, seconds: float) -> str:  # type: ignore[override]
        await asyncio.sleep(seconds)
        return self._name

    async def pass_gate(self) -> None:
        await self._gate.wait()

    def open_gate(self) -> None:
        self._gate.set()

    async def anumbers(self, n: int, size: int = 0) -> AsyncIterator[Any]:
        try:
            for number in range(n):
                self._counts["produced"] = self._counts.get("produced", 0) + 1
                yield bytes(size) if size else number
        finally:
            await asyncio.sleep(0)
            self._counts["closed"] = self._counts.get("closed", 0) + 1

    async def slowly(self, seconds: float) -> AsyncIterator[int]:  # type: ignore[override]
        for number in range(1000):
            await asyncio.sleep(seconds)
            yield number

    async def count(self, key: str, seconds: float = 0.0) -> None:  # type: ignore[override]
        await asyncio.sleep(seconds)
        self._counts[key] = self._counts.get(key, 0) + 1

    async def relay(self, seconds: float, topics: list[str], method: str, *args: Any) -> Any:  # type: ignore[override]
        await asyncio.sleep(seconds)
        async with AsyncClient(topics[0], node=self._node, timeout=60.0) as client:
            if len(topics) == 1:
                return await client.call(method, *args)
            return await client.call("relay", seconds, topics[1:], method, *args)


def say(what: Any) -> None:
    print(json.dumps(what), flush=True)


async def serve(options: dict[str, Any]) -> None:
    node = Node(options["matchmaker"], **options["server"].pop("node", {}))
    worker = AsyncWorker(node)
    server = AsyncServer(Topic(*options["topic"]), worker, node=node, **options["server"])
    worker._name = server.topic.server or ""
    await server.start()
    say({"endpoints": server.endpoints, "server": server.topic.server, "pid": os.getpid()})
    while line := await asyncio.to_thread(sys.stdin.readline):
        what, *arguments = json.loads(line)
        if what == "stop":
            say(await server.stop(*arguments))
        elif what == "start":
            say((await server.start()).endpoints)
        elif what == "stats":
            say(server.stats())
    os._exit(0)


def main(options: dict[str, Any]) -> None:
    if options["server"].pop("async", False):
        asyncio.run(serve(options))
    node = Node(options["matchmaker"], **options["server"].pop("node", {}))
    worker = Worker(node)
    server = Server(Topic(*options["topic"]), worker, node=node, **options["server"])
    worker._name = server.topic.server or ""
    server.start()

    say({"endpoints": server.endpoints, "server": server.topic.server, "pid": os.getpid()})
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        if what == "stop":
            say(server.stop(*arguments))
        elif what == "start":
            say(server.start().endpoints)
        elif what == "stats":
            say(server.stats())
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
