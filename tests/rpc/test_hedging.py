"""Hedged calls: a second member is asked if the first one takes long."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waiting_support import PATIENCE, eventually
from worker_support import Worker, lingering, settled

from zmqcore import AsyncClient, AsyncServer, Client, Node, Overloaded, RemoteError, Retry, Server

Serve = Callable[..., Server]
Connect = Callable[..., Client]
MakeNode = Callable[..., Node]
Running = Callable[..., Any]
Until = Callable[..., None]

#: So long that nothing ends by it, in seconds; what hangs is ended by PATIENCE.
EVER = 600.0


def test_hedging_is_for_what_may_be_executed_twice(both: Client) -> None:
    with pytest.raises(ValueError, match="idempotent"):
        both.prepare(hedge_after=0.1)
    with pytest.raises(ValueError, match="hedge_after"):
        both.prepare(idempotent=True, hedge_after=0.0)
    assert both.prepare(idempotent=True, hedge_after=0.1).prepare(hedge_after=None).call("linger") in "ab"


def test_the_first_answer_wins_and_the_other_call_is_cancelled(
    both: Client, workers: dict[str, Worker], until: Until
) -> None:
    client = both.prepare(idempotent=True, hedge_after=0.01)
    assert [client.call("linger", "a") for _ in range(6)] == ["b"] * 6
    assert not workers["a"].gate.is_set()
    until(lambda: settled(client))


def test_an_answer_in_time_needs_no_hedge(both: Client, workers: dict[str, Worker]) -> None:
    client = both.prepare(idempotent=True, hedge_after=PATIENCE)
    before = sum(worker.calls for worker in workers.values())
    assert Counter(client.call("linger") for _ in range(10)) == {"a": 5, "b": 5}
    assert sum(worker.calls for worker in workers.values()) == before + 10


def test_what_a_handler_raises_is_an_answer(both: Client) -> None:
    client = both.prepare(idempotent=True, hedge_after=0.01)
    for _ in range(2):
        with pytest.raises(RemoteError, match="ValueError: b"):
            client.call("fail", "b")


def test_without_a_budget_there_are_no_hedges(
    both: Client, workers: dict[str, Worker], running: Running
) -> None:
    while both._budget.spend():
        pass
    before = sum(worker.calls for worker in workers.values())
    calls = [
        running(both.prepare(idempotent=True, hedge_after=0.001).call, "linger", "a", "b") for _ in range(4)
    ]
    for worker in workers.values():
        for _ in range(2):
            assert worker.entered.acquire(timeout=PATIENCE)
    for call in calls:
        call.thread.join(0.02)
    for worker in workers.values():
        worker.gate.set()
    assert Counter(call.result() for call in calls) == {"a": 2, "b": 2}
    assert sum(worker.calls for worker in workers.values()) == before + 4


def test_the_first_answer_may_be_a_stream(serve: Serve, connect: Connect, until: Until) -> None:
    gate = threading.Event()

    def slow(number: int) -> Iterator[int]:
        gate.wait(PATIENCE)
        yield from range(number)

    serve("s", {"count": slow}, server="slow", workers=2)
    serve("s", {"count": lambda number: (yield from range(number))}, server="quick", workers=2)
    client = connect("s", idempotent=True, hedge_after=0.01)
    until(lambda: len(client.members()) == 2)
    one = client.prepare(hedge_after=None)
    quick = one.prepare(server="quick")
    assert list(quick.call("count", 3)) == [0, 1, 2]
    gate.set()
    assert [list(one.call("count", 2)) for _ in range(2)] == [[0, 1]] * 2
    gate.clear()
    assert [list(client.call("count", 200)) for _ in range(4)] == [list(range(200))] * 4
    gate.set()


def test_one_member_is_never_asked_twice(serve: Serve, connect: Connect, running: Running) -> None:
    worker = Worker("only")
    serve("one", worker, workers=4)
    client = connect("one", idempotent=True, hedge_after=0.01)
    call = running(client.call, "linger", "only")
    assert worker.entered.acquire(timeout=PATIENCE)
    call.thread.join(0.1)
    assert not call.ended
    worker.gate.set()
    assert call.result() == "only"
    assert worker.calls == 1


def test_a_member_that_dies_before_the_hedge_is_replaced_at_once(
    two: dict[str, Any], node: Node, running: Running, until: Until
) -> None:
    with Client("t", node=node, timeout=PATIENCE, idempotent=True, hedge_after=PATIENCE) as client:
        assert {client.call("who") for _ in range(4)} == {"a", "b"}
        call, peer = lingering(client, two, running, until)
        peer.kill()
        assert call.result() == "b"
        until(lambda: settled(client))


def test_hedged_coroutines(workers: dict[str, Worker], make_node: Callable[..., Node], registry: str) -> None:
    node = make_node(registry)

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE, idempotent=True) as client:
            assert {await client.call("linger") for _ in range(4)} == {"a", "b"}
            hedged = client.prepare(hedge_after=0.01)
            assert [await hedged.call("linger", "a") for _ in range(6)] == ["b"] * 6
            with pytest.raises(RemoteError, match="ValueError: b"):
                await hedged.call("fail", "b")
            while not settled(client):
                await asyncio.sleep(0.001)
            for worker in workers.values():
                while worker.entered.acquire(blocking=False):
                    pass
            both = asyncio.create_task(hedged.call("linger", "a", "b"))
            for worker in workers.values():
                while not worker.entered.acquire(blocking=False):
                    await asyncio.sleep(0.001)
            both.cancel()
            with pytest.raises(asyncio.CancelledError):
                await both
            while not settled(client):
                await asyncio.sleep(0.001)

    asyncio.run(main())


# -- a member takes nothing, or is not there ------------------------------------------------------------------


@pytest.fixture
def both_full(
    full: tuple[Server, Worker, Client], serve: Serve, connect: Connect, until: Until
) -> Iterator[list[tuple[Server, Worker]]]:
    """Two servers that reject everything until their workers' gates are opened."""
    worker = Worker("full")
    server = serve("t", worker, server="second", workers=1, queue_size=1, on_full="reject")
    client = connect("t", retry=None).prepare(server="second")
    filling = [client.submit("linger", "full") for _ in range(2)]
    assert worker.entered.acquire(timeout=PATIENCE)
    until(lambda: server.stats()["queued"] == 1)
    yield [full[:2], (server, worker)]
    worker.gate.set()
    assert [future.result(PATIENCE) for future in filling] == ["full"] * 2


def test_a_hedged_call_that_is_rejected_is_tried_again_later(
    both_full: list[tuple[Server, Worker]], connect: Connect, running: Running, until: Until
) -> None:
    client = connect("t", idempotent=True, hedge_after=EVER, retry=Retry(attempts=10, backoff=0.2))
    until(lambda: len(client.members()) == 2)
    call = running(client.call, "linger")
    until(lambda: sum(server.stats()["rejected"] for server, _ in both_full) >= 3)
    for _, worker in both_full:
        worker.gate.set()
    assert call.result() == "full"
    until(lambda: settled(client))


def test_how_often_a_hedged_call_is_tried(both_full: list[tuple[Server, Worker]], connect: Connect) -> None:
    client = connect("t", idempotent=True, hedge_after=EVER, retry=Retry(attempts=4, backoff=0.01))
    with pytest.raises(Overloaded):
        client.call("linger")
    assert sum(server.stats()["rejected"] for server, _ in both_full) == 4


def test_a_hedged_call_goes_to_the_member_that_is_not_full(
    both_full: list[tuple[Server, Worker]], serve: Serve, connect: Connect, until: Until
) -> None:
    assert both_full
    serve("t", Worker("free"), server="free")
    for _ in range(4):
        client = connect("t", idempotent=True, hedge_after=EVER)
        until(lambda client=client: len(client.members()) == 3)
        assert [client.call("linger") for _ in range(2)] == ["free"] * 2


def test_a_member_without_a_connection_is_asked_too(
    workers: dict[str, Worker], make_node: MakeNode, registry: str, until: Until
) -> None:
    while not workers["a"].entered.acquire(blocking=False):  # until it was the first one to be asked
        node = make_node(registry)
        with Client("t", node=node, timeout=PATIENCE, idempotent=True) as client:
            assert client.prepare(server="a").call("linger") == "a"
            until(lambda client=client: len(client.members()) == 2)
            assert client.prepare(hedge_after=0.01).call("linger", "a") == "b"
            assert [target.failures for target in client._route._balancer._targets] == [0, 0]
            until(lambda client=client: settled(client))


def hears_nothing(node: Node, endpoint: str) -> bool:
    """Whether ``node`` is still connecting to ``endpoint``."""
    return any(row["endpoint"] == endpoint and row["state"] == "connecting" for row in node.pool.snapshot())


def test_nobody_waits_for_a_connection_if_there_is_another_member(
    workers: dict[str, Worker], blackhole: str, make_node: MakeNode, registry: str, running: Running
) -> None:
    assert workers
    node = make_node(registry, connect_timeout=EVER)
    with Client("t", node=node) as found:
        good = found.members()[0].endpoints[0]
    with Client(
        "t", node=node, timeout=EVER, connect=[blackhole, good], idempotent=True, hedge_after=0.01
    ) as client:
        for _ in range(3):
            assert running(client.call, "linger").result() in "ab"
        assert hears_nothing(node, blackhole)


def test_no_coroutine_waits_for_a_connection_either(
    workers: dict[str, Worker], blackhole: str, make_node: MakeNode, registry: str
) -> None:
    assert workers
    node = make_node(registry, connect_timeout=EVER)
    with Client("t", node=node) as found:
        good = found.members()[0].endpoints[0]

    async def main() -> None:
        async with AsyncClient(
            "t", node=node, timeout=EVER, connect=[blackhole, good], idempotent=True, hedge_after=0.01
        ) as client:
            for _ in range(3):
                assert await asyncio.wait_for(client.call("linger"), PATIENCE) in "ab"
            assert hears_nothing(node, blackhole)

    asyncio.run(main())


# -- what is no answer ----------------------------------------------------------------------------------------


def test_a_hedge_that_cannot_be_sent_ends_nothing_and_costs_nothing(
    workers: dict[str, Worker], make_node: MakeNode, registry: str, running: Running, until: Until
) -> None:
    node = make_node(registry, max_sockets=1, max_waiting=0)
    with Client("t", node=node, timeout=PATIENCE, idempotent=True, hedge_after=0.01) as client:
        until(lambda: len(client.members()) == 2)
        call = running(client.call, "linger", "a", "b")
        until(lambda: node.pool.stats()["refused"] == 1)
        for worker in workers.values():
            worker.gate.set()
        assert call.result() in "ab"
        until(lambda: client._budget._balance == 10.0)


def test_nor_does_one_of_coroutines(workers: dict[str, Worker], make_node: MakeNode, registry: str) -> None:
    node = make_node(registry, max_sockets=1, max_waiting=0)

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE, idempotent=True, hedge_after=0.01) as client:
            await eventually(lambda: len(client.members()) == 2)
            call = client.submit("linger", "a", "b")
            await eventually(lambda: node.pool.stats()["refused"] == 1)
            for worker in workers.values():
                worker.gate.set()
            assert await call in "ab"
            await eventually(lambda: client._budget._balance == 10.0)

    asyncio.run(main())


def test_a_client_that_is_closed_ends_no_call_that_is_to_be_hedged(
    both: Client, workers: dict[str, Worker], running: Running, until: Until
) -> None:
    hedged = Client("t", node=both._node, timeout=PATIENCE, idempotent=True, hedge_after=0.2)
    until(lambda: len(hedged.members()) == 2)
    call = running(hedged.call, "linger", "a", "b")
    until(lambda: any(worker.entered.acquire(blocking=False) for worker in workers.values()))
    hedged.close()
    call.thread.join(0.4)
    for worker in workers.values():
        worker.gate.set()
    assert call.result() in "ab"


# -- the other call is cancelled ------------------------------------------------------------------------------


class Patient:
    """Coroutines that say how they end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.begun = self.interrupted = 0

    async def linger(self, *names: str) -> str:
        self.begun += 1
        try:
            if self.name in names:
                await asyncio.sleep(EVER)
        except asyncio.CancelledError:
            self.interrupted += 1
            raise
        return self.name


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_the_server_of_the_other_call_is_told(
    kind: type[Client | AsyncClient], make_node: MakeNode, registry: str
) -> None:
    async def main() -> None:
        a, b = Patient("a"), Patient("b")
        node = make_node(registry)
        async with (
            AsyncServer("t", a, server="a", node=make_node(registry)),
            AsyncServer("t", b, server="b", node=make_node(registry)),
        ):
            client = kind("t", node=node, timeout=PATIENCE, idempotent=True, hedge_after=0.01)
            await eventually(lambda: len(client.members()) == 2)
            while not a.begun:
                if isinstance(client, AsyncClient):
                    assert await client.call("linger", "a") == "b"
                else:
                    assert await asyncio.to_thread(client.call, "linger", "a") == "b"
            await eventually(lambda: a.interrupted == a.begun)
            await eventually(lambda: settled(client))
            if isinstance(client, AsyncClient):
                await client.close()
            else:
                await asyncio.to_thread(client.close)

    asyncio.run(main())


@pytest.mark.parametrize("hedge_after", [0.01, EVER])
def test_an_interrupt_ends_all_that_was_begun(
    hedge_after: float, both: Client, workers: dict[str, Worker], running: Running, until: Until
) -> None:
    """As Ctrl-C does: the exception is raised on the main thread."""
    begun = 2 if hedge_after < EVER else 1
    before = sum(worker.calls for worker in workers.values())

    def interrupt() -> None:
        until(lambda: sum(worker.calls for worker in workers.values()) == before + begun)
        os.kill(os.getpid(), signal.SIGINT)

    watching = running(interrupt)
    with pytest.raises(KeyboardInterrupt):
        both.prepare(idempotent=True, hedge_after=hedge_after).call("linger", "a", "b")
    watching.result()
    until(lambda: settled(both))
    assert sum(channel.stats()["cancelled"] for channel in both._node.pool.channels()) == begun


def test_an_answer_in_time_needs_no_thread(serve: Serve, connect: Connect, until: Until) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    for name in "ab":
        serve("threads", {"threads": threads}, server=name, workers=0)
    client = connect("threads", idempotent=True, hedge_after=EVER)
    until(lambda: len(client.members()) == 2)
    for _ in range(4):
        client.call("threads")  # once there are connections
    for _ in range(4):
        assert "zmqcore-hedge" not in client.call("threads")
