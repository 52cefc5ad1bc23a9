"""Clients whose endpoints name hosts. libzmq does not know these names, and no name server is asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from name_support import Names
from waiting_support import PATIENCE, until

from zmqcore import AsyncClient, Client, Node, Server, Unreachable


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    with Names(monkeypatch) as made:
        yield made


class Echo:
    def echo(self, value: object) -> object:
        return value


def named(server: Server, host: str) -> str:
    return f"tcp://{host}:{server.endpoints[0].rpartition(':')[2]}"


def test_a_client_by_name(names: Names) -> None:
    names.known["here.test"] = ["127.0.0.1"]
    with (
        Node("memory://names") as node,
        Server("t", Echo(), node=node, bind="tcp://127.0.0.1:*") as server,
    ):
        assert Client("t", node=node, connect=named(server, "here.test")).call("echo", 1) == 1

        async def ask() -> object:
            client = AsyncClient("t", node=node, connect=named(server, "HERE.test"))
            return await client.call("echo", 2)

        assert asyncio.run(ask()) == 2
        assert named(server, "here.test") in node.stats()["channels"]


def test_a_name_that_is_not_resolved_costs_nobody_else(names: Names) -> None:
    """Neither its own caller, who is told by his deadline, nor who calls others meanwhile on the same node."""
    names.answers.clear()
    with (
        Node("memory://names", connect_timeout=PATIENCE) as node,
        Server("t", Echo(), node=node, bind="tcp://127.0.0.1:*") as server,
    ):
        slow = named(server, "slow.test")
        with pytest.raises(Unreachable, match=r"slow\.test: the name has not been resolved yet"):
            Client("t", node=node, connect=slow, timeout=0.2).call("echo", 1)
        waits = Client("t", node=node, connect=slow, timeout=PATIENCE)
        got: list[object] = []
        thread = threading.Thread(target=lambda: got.append(waits.call("echo", 3)))
        thread.start()
        until(lambda: node.pool.stats()["connecting"] == 1)
        live = Client("t", node=node, connect=server.endpoints[0], timeout=PATIENCE)
        assert live.call("echo", 2) == 2
        assert not got
        names.known["slow.test"] = ["127.0.0.1"]
        names.answers.set()
        thread.join()
        assert got == [3]


def test_an_event_loop_goes_on_while_a_name_is_resolved(names: Names) -> None:
    names.answers.clear()

    async def main(node: Node, server: Server) -> None:
        slow = AsyncClient("t", node=node, connect=named(server, "slow.test"), timeout=PATIENCE)
        live = AsyncClient("t", node=node, connect=server.endpoints[0], timeout=PATIENCE)
        waits = asyncio.ensure_future(slow.call("echo", 1))
        assert await live.call("echo", 2) == 2
        assert not waits.done()
        names.known["slow.test"] = ["127.0.0.1"]
        names.answers.set()
        assert await waits == 1

    with (
        Node("memory://names", connect_timeout=PATIENCE) as node,
        Server("t", Echo(), node=node, bind="tcp://127.0.0.1:*") as server,
    ):
        asyncio.run(main(node, server))
