"""More work than a server can do: the bounded queue, what is rejected, and where it goes then."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zmqcore import AsyncClient, AsyncServer, Client, Node, Overloaded, Server

Serve = Callable[..., Server]
Connect = Callable[..., Client]
Until = Callable[..., None]

PATIENCE = 30.0


class Gate:
    """Handlers that end when they are told to, and count."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.ran: list[Any] = []

    def wait(self, value: Any = None) -> Any:
        self.entered.release()
        assert self.opened.wait(PATIENCE)
        self.ran.append(value)
        return value

    def note(self, value: Any) -> None:
        self.ran.append(value)

    def echo(self, value: Any) -> Any:
        return value

    def await_entered(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def outcomes(futures: list[concurrent.futures.Future[Any]]) -> tuple[list[Any], list[BaseException]]:
    """The results and the errors."""
    concurrent.futures.wait(futures, PATIENCE)
    errors = [future.exception() for future in futures]
    return (
        [future.result() for future, error in zip(futures, errors, strict=True) if error is None],
        [error for error in errors if error is not None],
    )


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"queue_size": 0}, "queue_size is 0"),
        ({"on_full": "drop"}, "on_full is 'drop'"),
        ({"on_full": "reject", "workers": 0}, "workers=1"),
    ],
)
def test_options_are_checked(
    make_node: Callable[..., Node], registry: str, gate: Gate, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        Server("t", gate, node=make_node(registry), **options)


# -- what is rejected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "queue_size"), [(1, 1), (1, 4), (3, 4), (2, 100)])
def test_calls_beyond_workers_and_queue_are_rejected_at_once(
    serve: Serve, connect: Connect, gate: Gate, workers: int, queue_size: int
) -> None:
    """However far the load is above the capacity: as much as fits is done, and all the rest is answered at once."""
    server = serve("t", gate, workers=workers, queue_size=queue_size, on_full="reject")
    client = connect("t")
    for _ in range(3):
        gate.opened.clear()
        gate.ran.clear()
        before = server.stats()["rejected"]
        running = [client.submit("wait", number) for number in range(workers)]
        for _ in running:
            gate.await_entered()
        offered = 3 * (workers + queue_size)
        more = [client.submit("wait", workers + number) for number in range(offered)]
        # The last one's answer comes while all handlers still run.
        assert isinstance(more[-1].exception(PATIENCE), Overloaded)
        assert not gate.ran
        gate.opened.set()
        results, errors = outcomes(running + more)
        assert results == list(range(workers + queue_size)), "first come, first served"
        assert sorted(gate.ran) == results, "what was rejected has not run"
        assert {type(error) for error in errors} == {Overloaded}
        assert f"the limits workers={workers} and queue_size={queue_size} are reached" in str(errors[0])
        assert server.stats()["rejected"] - before == len(errors) == offered - queue_size
        while gate.entered.acquire(blocking=False):
            pass


def test_a_server_that_waits_rejects_nothing(serve: Serve, connect: Connect, gate: Gate) -> None:
    server = serve("t", gate, workers=1, queue_size=1)
    client = connect("t")
    futures = [client.submit("wait", number) for number in range(200)]
    gate.await_entered()
    gate.opened.set()
    assert outcomes(futures) == (list(range(200)), [])
    assert server.stats()["rejected"] == 0


def test_casts_are_never_rejected(serve: Serve, connect: Connect, gate: Gate, until: Until) -> None:
    """Nobody could be told. They wait, and beyond twice the queue the server stops reading."""
    server = serve("t", gate, workers=1, queue_size=10, on_full="reject")
    client = connect("t")
    running = client.submit("wait", "first")
    gate.await_entered()
    for number in range(1000):
        client.cast("note", number)
    until(lambda: server.stats()["queued"] >= 20)
    assert server.stats()["queued"] < 20 + 64, "twice the queue and a batch"
    gate.opened.set()
    assert running.result() == "first"
    assert server.stop() is True
    assert gate.ran == ["first", *range(1000)]


def test_calls_are_rejected_while_casts_fill_the_queue(
    serve: Serve, connect: Connect, gate: Gate, until: Until
) -> None:
    server = serve("t", gate, workers=1, queue_size=10, on_full="reject")
    client = connect("t")
    running = client.submit("wait")
    gate.await_entered()
    for number in range(10):
        client.cast("note", number)
    with pytest.raises(Overloaded):
        client.call("echo", 1)
    gate.opened.set()
    running.result()
    until(lambda: server.stats()["queued"] == 0)
    assert client.call("echo", 1) == 1


def test_a_full_server_still_tells_about_itself(
    serve: Serve, connect: Connect, gate: Gate, until: Until
) -> None:
    server = serve("t", gate, workers=1, queue_size=1, on_full="reject")
    client = connect("t")
    futures = [client.submit("wait", number) for number in range(2)]
    gate.await_entered()
    until(lambda: server.stats()["queued"] == 1)
    with pytest.raises(Overloaded):
        client.prepare(retry=None).call("wait")
    asking = client.submit("zmqcore.stats")
    until(lambda: server.stats()["queued"] == 2)
    gate.opened.set()
    assert asking.result()["rejected"] == 1
    assert outcomes(futures) == ([0, 1], [])


def test_the_log_tells_of_it_once(
    serve: Serve, connect: Connect, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    serve("t", gate, workers=1, queue_size=1, on_full="reject")
    client = connect("t")
    with caplog.at_level(logging.WARNING, "zmqcore.server"):
        futures = [client.submit("wait") for _ in range(100)]
        assert isinstance(futures[-1].exception(PATIENCE), Overloaded)
        gate.opened.set()
        outcomes(futures)
    (record,) = caplog.records
    assert (
        "is overloaded: the limits workers=1 and queue_size=1 are reached; 1 calls rejected"
        in record.getMessage()
    )


def test_draining_goes_on_rejecting(
    serve: Serve, connect: Connect, gate: Gate, running: Callable[..., Any]
) -> None:
    server = serve("t", gate, workers=1, queue_size=2, on_full="reject")
    client = connect("t")
    futures = [client.submit("wait", number) for number in range(20)]
    gate.await_entered()
    stopping = running(server.stop, timeout=PATIENCE)
    stopping.thread.join(0.1)
    gate.opened.set()
    assert stopping.result() is True
    results, errors = outcomes(futures)
    assert results == [0, 1, 2]
    assert {type(error) for error in errors} == {Overloaded}


# -- where it goes then --------------------------------------------------------------------------------------


def test_another_member_takes_what_one_rejects(
    serve: Serve, connect: Connect, gate: Gate, until: Until
) -> None:
    full = serve("t", gate, server="full", workers=1, queue_size=1, on_full="reject")
    serve("t", {"echo": lambda value: value, "wait": lambda value: value}, server="free")
    client = connect("t")
    filling = [client.prepare(server="full").submit("wait", number) for number in range(2)]
    gate.await_entered()
    until(lambda: full.stats()["queued"] == 1)
    until(lambda: len(client.members()) == 2)
    assert [client.call("echo", number) for number in range(20)] == list(range(20))
    assert full.stats()["rejected"] > 0, "none has been there"
    gate.opened.set()
    assert outcomes(filling) == ([0, 1], [])


def test_when_all_are_full_the_caller_is_told_at_once(
    serve: Serve, connect: Connect, gate: Gate, until: Until
) -> None:
    servers = [
        serve("t", gate, server=name, workers=1, queue_size=1, on_full="reject") for name in ("a", "b", "c")
    ]
    client = connect("t", timeout=None)
    until(lambda: len(client.members()) == 3)
    filling = []
    for server in servers:
        one = client.prepare(server=server.topic.server)
        filling.append(one.submit("wait"))
        gate.await_entered()
        filling.append(one.submit("wait"))
    until(lambda: all(server.stats()["queued"] == 1 for server in servers))
    with pytest.raises(Overloaded, match="workers=1"):
        client.call("echo", 1)
    assert [server.stats()["rejected"] for server in servers] == [1, 1, 1], "each has been asked once"
    gate.opened.set()
    outcomes(filling)


# -- coroutines ----------------------------------------------------------------------------------------------


class AsyncGate:
    """As above, for one loop."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.ran: list[Any] = []

    async def wait(self, value: Any = None) -> Any:
        await self.opened.wait()
        self.ran.append(value)
        return value

    def echo(self, value: Any) -> Any:
        return value


def test_an_async_server_rejects_what_does_not_fit(make_node: Callable[..., Node], registry: str) -> None:
    here, there = make_node(registry), make_node(registry)

    async def main() -> None:
        gate = AsyncGate()
        options: dict[str, Any] = {"max_concurrency": 3, "queue_size": 4, "on_full": "reject"}
        async with (
            AsyncServer("t", gate, node=here, **options) as server,
            AsyncClient("t", node=there, timeout=PATIENCE, retry=None) as client,
        ):
            assert await client.call("echo", 1) == 1
            calls = [client.submit("wait", number) for number in range(100)]
            rejected = await asyncio.gather(*calls[7:], return_exceptions=True)
            assert {type(error) for error in rejected} == {Overloaded}
            assert "max_concurrency=3 and queue_size=4" in str(rejected[0])
            stats = server.stats()
            assert (stats["tasks"], stats["queued"], stats["rejected"]) == (3, 4, 93)
            assert await client.call("echo", 1) == 1, "plain functions do not wait for coroutines"
            gate.opened.set()
            assert await asyncio.gather(*calls[:7]) == list(range(7))
            assert gate.ran == list(range(7))
            assert await client.call("wait", "again") == "again"

    asyncio.run(main())


def test_an_async_client_tries_another_member(make_node: Callable[..., Node], registry: str) -> None:
    here, there = make_node(registry), make_node(registry)

    async def main() -> None:
        gate, free = AsyncGate(), AsyncGate()
        free.opened.set()
        options: dict[str, Any] = {"max_concurrency": 1, "queue_size": 1, "on_full": "reject"}
        async with (
            AsyncServer("t", gate, node=here, server="full", **options) as full,
            AsyncServer("t", free, node=here, server="free"),
            AsyncClient("t", node=there, timeout=PATIENCE) as client,
        ):
            one = client.prepare(server="full")
            filling = [one.submit("wait", number) for number in range(2)]
            while full.stats()["queued"] < 1:
                await asyncio.sleep(0.005)
            assert [await client.call("wait", number) for number in range(20)] == list(range(20))
            assert full.stats()["rejected"] > 0
            with pytest.raises(Overloaded):
                await one.call("wait")
            gate.opened.set()
            assert await asyncio.gather(*filling) == [0, 1]

    asyncio.run(main())
