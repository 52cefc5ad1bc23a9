"""Hedged calls: a second member is asked if the first one takes long."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waiting_support import PATIENCE
from worker_support import Worker, lingering, settled

from zmqcore import AsyncClient, Client, Node, RemoteError, Server

Serve = Callable[..., Server]
Connect = Callable[..., Client]
MakeNode = Callable[..., Node]
Running = Callable[..., Any]
Until = Callable[..., None]


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
