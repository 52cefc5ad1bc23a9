"""A server in a process of its own that writes down what it runs: ``recorder.py OPTIONS``, a JSON map.

``note(sender, number, seconds)`` appends "NAME SENDER NUMBER" to ``path``, by one write(2) when it ends: what is killed
has written whole lines only. A line on stdin has it drain, say whether all was finished, and end. What it says is JSON:
its endpoints, and that.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from zmqcore import AsyncServer, Node, Server


class Recorder:
    def __init__(self, path: str, name: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._name = name

    def note(self, sender: str, number: int, seconds: float = 0.0, _: Any = None) -> None:
        if seconds:
            time.sleep(seconds)
        os.write(self._file, f"{self._name} {sender} {number}\n".encode())

    def fail(self, sender: str, number: int) -> None:
        self.note(sender, number)
        raise ValueError(number)

    def hold(self, sender: str, number: int, until: str) -> None:
        """Go on as soon as the file ``until`` exists."""
        while not Path(until).exists():
            time.sleep(0.001)
        self.note(sender, number)

    def exit(self, sender: str, number: int, after: str) -> None:
        """Be killed as soon as the file ``after`` exists."""
        self.hold(sender, number, after)
        os.kill(os.getpid(), 9)


class AsyncRecorder(Recorder):
    async def note(self, sender: str, number: int, seconds: float = 0.0, _: Any = None) -> None:  # type: ignore[override]
        await asyncio.sleep(seconds)
        super().note(sender, number)


def say(what: Any) -> None:
    print(json.dumps(what), flush=True)


async def serve(options: dict[str, Any]) -> None:
    recorder = AsyncRecorder(options["path"], options["name"])
    node = Node(options["matchmaker"])
    server = AsyncServer(options["topic"], recorder, node=node, **options["server"])
    await server.start()
    say({"endpoints": server.endpoints})
    await asyncio.to_thread(sys.stdin.readline)
    say({"finished": await server.stop()})
    node.close()


def main(options: dict[str, Any]) -> None:
    if options.pop("async", False):
        asyncio.run(serve(options))
        return
    recorder = Recorder(options["path"], options["name"])
    with Node(options["matchmaker"]) as node:
        server = Server(options["topic"], recorder, node=node, **options["server"]).start()
        say({"endpoints": server.endpoints})
        sys.stdin.readline()
        say({"finished": server.stop()})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
