"""Who gives a call up tells the server: it does not begin it, or interrupts a coroutine; and the counters add up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest
from waiting_support import PATIENCE, eventually

from zmqcore import AsyncClient, AsyncServer, Client, Node, RemoteError, Server
from zmqcore.rpc import loop as loops

Peers = Callable[..., Any]
Serve = Callable[..., Server]
Connect = Callable[..., Client]
Until = Callable[..., None]
MakeNode = Callable[..., Node]

#: How many calls the storm has; ``ZMQCORE_STORM=100000`` for the whole of it.
STORM = int(os.environ.get("ZMQCORE_STORM", "6000"))


class Steps:
    """Coroutines that say how far they got."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.ended: list[Any] = []
        self.interrupted: list[Any] = []

    async def wait(self, name: Any, seconds: float = 60.0) -> Any:
        self.begun.append(name)
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.interrupted.append(name)
            raise
        self.ended.append(name)
        return name

    async def stubborn(self, name: Any) -> Any:
        """Goes on although it is cancelled."""
        self.begun.append(name)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60.0)
        self.ended.append(name)
        return name

    async def clumsy(self, name: Any) -> None:
        """Fails when it is cancelled."""
        self.begun.append(name)
        try:
            await asyncio.sleep(60.0)
        finally:
            raise LookupError(name)

    async def cancels_itself(self) -> None:
        raise asyncio.CancelledError("of its own")

    def echo(self, value: Any) -> Any:
        return value


class Gate:
    """Plain functions that wait."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun: list[Any] = []

    def wait(self, name: Any) -> Any:
        self.begun.append(name)
        self.opened.wait(60.0)
        return name


def test_a_coroutine_is_interrupted(make_node: MakeNode, registry: str) -> None:
    async def main() -> None:
        steps = Steps()
        async with (
            AsyncServer("t", steps, node=make_node(registry)) as server,
            AsyncClient("t", node=make_node(registry), timeout=None) as client,
        ):
            tasks = [client.submit("wait", name) for name in "abc"]
            await eventually(lambda: len(steps.begun) == 3)
            tasks[1].cancel()
            await eventually(lambda: steps.interrupted)
            assert steps.interrupted == ["b"]
            assert server.stats()["tasks"] == 2
            assert server.stats()["port"]["cancelled"] == 1
            assert server.stats()["failed"] == 0
            for task in tasks:
                task.cancel()
            await eventually(lambda: not server.stats()["tasks"])
            assert await client.call("echo", 1) == 1
            stats = server.stats()["port"]
            assert (stats["calls"], stats["replies"], stats["cancelled"]) == (4, 1, 3)

    asyncio.run(main())


def test_what_a_coroutine_makes_of_it_is_its_own(
    make_node: MakeNode, registry: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        steps = Steps()
        async with (
            AsyncServer("t", steps, node=make_node(registry)) as server,
            AsyncClient("t", node=make_node(registry), timeout=PATIENCE) as client,
        ):
            tasks = [client.submit("stubborn", "s"), client.submit("clumsy", "c")]
            await eventually(lambda: len(steps.begun) == 2)
            for task in tasks:
                task.cancel()
            await eventually(lambda: not server.stats()["tasks"])
            assert steps.ended == ["s"]
            assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
                "call 'clumsy' raised"
            ]
            # Not the caller's doing: it hears of it.
            with pytest.raises(RemoteError, match="of its own"):
                await client.call("cancels_itself")
            assert (server.stats()["handled"], server.stats()["failed"]) == (1, 2)

    asyncio.run(main())


def test_a_server_with_no_room_for_more_still_hears_it(make_node: MakeNode, registry: str) -> None:
    async def main() -> None:
        steps = Steps()
        async with (
            AsyncServer("t", steps, node=make_node(registry), max_concurrency=1, queue_size=1) as server,
            AsyncClient("t", node=make_node(registry), timeout=PATIENCE) as client,
        ):
            running = client.submit("wait", "running")
            await eventually(lambda: steps.begun)
            others = [client.submit("wait", number, 0.0) for number in range(100)]
            await eventually(lambda: server.stats()["port"]["set_aside"])
            others[50].cancel()
            running.cancel()
            await eventually(lambda: steps.interrupted)
            results = await asyncio.gather(*others, return_exceptions=True)
            assert isinstance(results.pop(50), asyncio.CancelledError)
            assert results == [*range(50), *range(51, 100)]
            assert steps.begun == ["running", *results]
            assert server.stats()["port"]["set_aside"] == 0

    asyncio.run(main())


def test_requests_that_were_set_aside_are_run_in_order_and_acknowledged(
    make_node: MakeNode, registry: str, serve: Serve
) -> None:
    gate = Gate()
    serve("t", gate, workers=1, queue_size=1)
    node = make_node(registry, window_messages=1000)
    with Client("t", node=node, timeout=PATIENCE) as client:
        futures = [client.submit("wait", number) for number in range(600)]
        (channel,) = node.pool.channels()
        # Set aside, they are not taken, so the window stays occupied.
        assert channel.ping(PATIENCE)
        assert channel.stats()["window_messages"] >= 500
        gate.opened.set()
        assert [future.result() for future in futures] == list(range(600))
        assert gate.begun == list(range(600))
        assert channel.ping(PATIENCE)
        channel.settle()
        assert channel.stats()["window_messages"] == 0


def test_a_plain_function_that_has_not_begun_is_skipped(serve: Serve, connect: Connect, until: Until) -> None:
    gate = Gate()
    server = serve("t", gate, workers=2)
    client = connect("t")
    busy = [client.submit("wait", "busy") for _ in range(2)]
    until(lambda: len(gate.begun) == len(busy))
    futures = [client.submit("wait", number) for number in range(4)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    until(lambda: server.stats()["port"]["cancelled"] == 2)
    gate.opened.set()
    assert [future.result() for future in (*busy, futures[1], futures[3])] == ["busy", "busy", 1, 3]
    assert set(gate.begun) == {"busy", 1, 3}
    stats = server.stats()
    assert (stats["handled"], stats["port"]["cancelled"], stats["port"]["replies"]) == (4, 2, 4)
    with pytest.raises(CancelledError):
        futures[0].result()


def test_a_plain_function_that_runs_is_not_interrupted_and_not_answered(
    serve: Serve, connect: Connect, until: Until
) -> None:
    gate = Gate()
    server = serve("t", gate, workers=1)
    client = connect("t")
    future = client.submit("wait", "x")
    until(lambda: gate.begun)
    assert future.cancel()
    until(lambda: server.stats()["port"]["cancelled"])
    gate.opened.set()
    until(lambda: server.stats()["handled"])
    assert client.call("zmqcore.ping")
    (channel,) = client._node.pool.channels()
    assert (channel.stats()["cancelled"], channel.stats()["late_replies"]) == (1, 0)


def test_draining_does_not_wait_for_what_was_cancelled(make_node: MakeNode, registry: str) -> None:
    async def main() -> None:
        steps = Steps()
        server = await AsyncServer("t", steps, node=make_node(registry)).start()
        async with AsyncClient("t", node=make_node(registry), timeout=None) as client:
            task = client.submit("wait", "x")
            await eventually(lambda: steps.begun)
            stopping = asyncio.create_task(server.stop(timeout=PATIENCE))
            await eventually(lambda: not server.running)
            task.cancel()
            assert await stopping
            assert steps.interrupted == ["x"]

    asyncio.run(main())


def test_a_storm(peers: Peers, node: Node) -> None:
    """A third of many calls is cancelled, at any point of their lives; each counter says the same."""
    peer = peers("t", "s", **{"async": True})
    chance = random.Random(7)

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=None)
        assert await client.call("echo", 1) == 1
        (channel,) = node.pool.channels()
        loop = asyncio.get_running_loop()
        tasks = []
        for number in range(STORM):
            task = client.submit("sleep", chance.choice((0.0, 0.001, 0.02)))
            if number % 3 == 0:
                loop.call_later(chance.choice((0.0, 0.0005, 0.01)), task.cancel)
            tasks.append(task)
            if number % 50 == 0:
                await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = [isinstance(result, asyncio.CancelledError) for result in results]
        assert all(was or result == "s" for result, was in zip(results, cancelled, strict=True))
        assert 0 < sum(cancelled) <= len(tasks[::3])
        assert not any(was for number, was in enumerate(cancelled) if number % 3)
        assert loops.channels_of_running_loop(node).n_awaited == 0
        stats = channel.stats()
        assert stats["calls"] == stats["replies"] + stats["cancelled"]
        assert (stats["outstanding_calls"], stats["timeouts"], stats["lost"]) == (0, 0, 0)

        # Every call was answered or given up, at the server as here; what crossed on the way came late.
        def settled() -> bool:
            nonlocal port
            port = peer.ask("stats")["port"]
            return bool(port["calls"] == port["replies"] + port["cancelled"])

        port: dict[str, int] = {}
        await eventually(settled)
        assert port["calls"] == stats["calls"] == port["replies"] + port["cancelled"]
        channel.look()
        assert channel.stats()["late_replies"] == port["replies"] - stats["replies"]

    asyncio.run(main())


@pytest.mark.parametrize("workers", [0, 3])
def test_a_storm_of_futures(peers: Peers, node: Node, until: Until, workers: int) -> None:
    peer = peers("t", workers=workers)
    client = Client("t", node=node, timeout=None)
    assert client.call("echo", 1) == 1
    (channel,) = node.pool.channels()
    futures, cancelled = [], {}
    for number in range(3000):
        futures.append(client.submit("sleep", 0.0001))
        if number % 6 == 0:
            cancelled[number] = futures[number].cancel()  # it can hardly have been answered
    for number in range(3, 3000, 6):
        cancelled[number] = futures[number].cancel()
    for number, future in enumerate(futures):
        if not cancelled.get(number):
            assert future.result() == peer.server
        else:
            with pytest.raises(CancelledError):
                future.result()
    stats = channel.stats()
    assert stats["calls"] == stats["replies"] + stats["cancelled"] == 3001
    assert (stats["cancelled"], stats["outstanding_calls"]) == (sum(cancelled.values()), 0)
    assert stats["cancelled"] > 0

    def settled() -> bool:
        port = peer.ask("stats")["port"]
        return bool(port["calls"] == 3001 == port["replies"] + port["cancelled"])

    until(settled)
