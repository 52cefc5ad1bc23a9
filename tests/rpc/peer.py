"""A server in a process of its own: ``peer.py OPTIONS``, a JSON map.

Serves a Worker, says where, then obeys its stdin, a JSON list per line, and answers each by a line of JSON:
``["stop", drain, timeout]``, ``["stats"]``, ``["start"]``. At the end of stdin it ends without a word to
anybody.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from zmqcore import Client, Node, Server, Topic
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

    def count(self, key: str, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + 1

    def counted(self, key: str) -> int:
        return self._counts.get(key, 0)

    def remaining(self) -> float | None:
        return deadline.remaining()

    def relay(self, seconds: float, topics: list[str], method: str, *args: Any) -> Any:
        """Sleep, then have the next topic do the same; the last one runs ``method``."""
        time.sleep(seconds)
        with Client(topics[0], node=self._node, timeout=60.0) as client:
            if len(topics) == 1:
                return client.call(method, *args)
            return client.call("relay", seconds, topics[1:], method, *args)

    def write(self, path: str, text: str) -> None:
        Path(path).write_text(text)


def main(options: dict[str, Any]) -> None:
    node = Node(options["matchmaker"])
    worker = Worker(node)
    server = Server(Topic(*options["topic"]), worker, node=node, **options["server"])
    worker._name = server.topic.server or ""
    server.start()

    def say(what: Any) -> None:
        print(json.dumps(what), flush=True)

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
