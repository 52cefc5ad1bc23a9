"""The server of the unit benchmarks: ``python served.py ENDPOINT [--workers N | --asyncio]``.

It says where it listens, in a line of JSON, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Iterator
from typing import Any

from peer import Target, obey_beside, say

from zmqcore import AsyncServer, Node, Server


class Methods(Target):
    """What is called from afar here only."""

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    def fail(self) -> None:
        raise LookupError("no such sku")


class AsyncTarget:
    """The same for an event loop, as far as it differs there."""

    async def echo(self, payload: Any) -> Any:
        return payload


async def serve_coroutines(endpoint: str) -> None:
    server = AsyncServer("bench", AsyncTarget(), node=Node("memory://bench"), bind=endpoint)
    await server.start()
    say(endpoint=server.endpoints[0])
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--asyncio", action="store_true")
    options = parser.parse_args()
    obey_beside()
    if options.asyncio:
        asyncio.run(serve_coroutines(options.endpoint))
    else:
        node = Node("memory://bench")
        server = Server("bench", Methods(), node=node, workers=options.workers, bind=options.endpoint)
        server.start()
        say(endpoint=server.endpoints[0])
        threading.Event().wait()


if __name__ == "__main__":
    main()
