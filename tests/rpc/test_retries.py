"""What is tried again elsewhere or later, what is not, and hedged calls."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import zmqcore
from zmqcore import AsyncClient, Client, Node, Overloaded, PeerLost, RemoteError, Retry, Server

PATIENCE = 30.0

Serve = Callable[..., Server]
Connect = Callable[..., Client]
Peers = Callable[..., Any]
Running = Callable[..., Any]
Until = Callable[..., None]


class Worker:
    """Takes its time, if its name is the one that is said, until the gate is opened."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.calls = 0

    def linger(self, *names: str) -> str:
        self.calls += 1
        if self.name in names:
            self.entered.release()
            self.gate.wait(PATIENCE)
        return self.name

    def fail(self, *names: str) -> str:
        if self.name not in names:
            self.gate.wait(PATIENCE)
        raise ValueError(self.name)


@pytest.fixture
def workers(serve: Serve) -> Iterator[dict[str, Worker]]:
    """Two servers, "a" and "b"."""
    made = {name: Worker(name) for name in "ab"}
    for name, worker in made.items():
        # More than calls that linger: a handler on a thread cannot be cancelled.
        serve("t", worker, server=name, workers=16)
    yield made
    for worker in made.values():
        worker.gate.set()


def settled(client: Client | AsyncClient) -> bool:
    """Whether no call counts as outstanding any more."""
    balancer = client._route._balancer
    return balancer._outstanding == 0 and {target.outstanding for target in balancer._targets} == {0}


@pytest.fixture
def both(workers: dict[str, Worker], connect: Connect, until: Until) -> Iterator[Client]:
    """A client of both, connected to both."""
    client = connect("t")
    until(lambda: len(client.members()) == 2)
    assert {client.call("linger") for _ in range(4)} == {"a", "b"}
    yield client
    for worker in workers.values():
        worker.gate.set()
    until(lambda: settled(client))


# -- a member is lost ----------------------------------------------------------------------------------------


def lingering(client: Client, peers: dict[str, Any], running: Running, until: Until) -> tuple[Any, Any]:
    """Start calls until one lingers in "a"; return it and the peer."""
    watch = client.prepare(server="a")
    while True:
        call = running(client.call, "count_in", "a", PATIENCE)
        until(lambda call=call: call.ended or watch.call("counted", "a"))
        if not call.ended:
            return call, peers["a"]


@pytest.fixture
def two(peers: Peers) -> dict[str, Any]:
    return {name: peers("t", name, workers=4) for name in "ab"}


def test_an_idempotent_call_to_a_member_that_dies_is_made_elsewhere(
    two: dict[str, Any], node: Node, running: Running, until: Until
) -> None:
    with Client("t", node=node, timeout=PATIENCE, idempotent=True) as client:
        call, peer = lingering(client, two, running, until)
        peer.kill()
        assert call.result() == "b"
        until(lambda: settled(client))


def test_any_other_call_is_not(two: dict[str, Any], node: Node, running: Running, until: Until) -> None:
    with Client("t", node=node, timeout=PATIENCE) as client:
        call, peer = lingering(client, two, running, until)
        peer.kill()
        error = call.join()
        assert isinstance(error, PeerLost)
        assert error.executed_possible
        assert client.call("who") == "b"
        until(lambda: settled(client))


def test_an_idempotent_call_of_coroutines_is_made_elsewhere(two: dict[str, Any], node: Node) -> None:
    with Client("t", node=node, timeout=PATIENCE) as watch:

        async def main() -> None:
            async with AsyncClient("t", node=node, timeout=PATIENCE, idempotent=True) as client:
                calls = [client.submit("count_in", "a", PATIENCE) for _ in range(2)]
                in_a = watch.prepare(server="a")
                while not await asyncio.to_thread(in_a.call, "counted", "a"):
                    await asyncio.sleep(0.005)
                two["a"].kill()
                assert await asyncio.gather(*calls) == ["b", "b"]
                assert settled(client)

        asyncio.run(main())


def test_an_idempotency_key_goes_along_and_makes_a_call_idempotent(serve: Serve, connect: Connect) -> None:
    serve("keys", {"seen": zmqcore.metadata})
    client = connect("keys", metadata={"trace": "1"})
    keyed = client.prepare(idempotency_key="invoice-17")
    assert keyed.idempotent
    assert not client.idempotent
    assert keyed.call("seen") == {"trace": "1", "idempotency-key": "invoice-17"}
    assert keyed.prepare(idempotency_key="18", metadata=None).call("seen") == {"idempotency-key": "18"}
    assert client.call("seen") == {"trace": "1"}
    with pytest.raises(ValueError, match="idempotency_key"):
        client.prepare(idempotency_key="")


# -- a member is overloaded ----------------------------------------------------------------------------------


@pytest.fixture
def full(serve: Serve, connect: Connect, until: Until) -> Iterator[tuple[Server, Worker, Client]]:
    """A server that rejects everything until its worker's gate is opened, and a client."""
    worker = Worker("full")
    server = serve("t", worker, workers=1, queue_size=1, on_full="reject")
    client = connect("t")
    filling = [client.submit("linger", "full") for _ in range(2)]
    assert worker.entered.acquire(timeout=PATIENCE)
    until(lambda: server.stats()["queued"] == 1)
    yield server, worker, client
    worker.gate.set()
    assert [future.result(PATIENCE) for future in filling] == ["full"] * 2


def test_a_rejected_call_is_tried_again_later(
    full: tuple[Server, Worker, Client], running: Running, until: Until
) -> None:
    server, worker, client = full
    call = running(client.prepare(retry=Retry(attempts=10, backoff=0.2)).call, "linger")
    until(lambda: server.stats()["rejected"] >= 2)
    worker.gate.set()
    assert call.result() == "full"


def test_a_rejected_call_of_coroutines_is_tried_again_later(
    full: tuple[Server, Worker, Client], make_node: Callable[..., Node], registry: str
) -> None:
    server, worker, _ = full
    node = make_node(registry)

    async def main() -> None:
        async with AsyncClient(
            "t", node=node, timeout=PATIENCE, retry=Retry(attempts=10, backoff=0.2)
        ) as client:
            with pytest.raises(Overloaded):
                await client.prepare(retry=None).call("linger")
            call = client.submit("linger")
            while server.stats()["rejected"] < 3:
                await asyncio.sleep(0.005)
            worker.gate.set()
            assert await call == "full"

    asyncio.run(main())


@pytest.mark.parametrize(("retry", "attempts"), [(None, 1), (Retry(attempts=1), 1), (Retry(backoff=0.01), 3)])
def test_how_often(full: tuple[Server, Worker, Client], retry: Retry | None, attempts: int) -> None:
    server, _, client = full
    with pytest.raises(Overloaded):
        client.prepare(retry=retry).call("linger")
    assert server.stats()["rejected"] == attempts


def test_retries_stay_a_tenth_of_the_calls(full: tuple[Server, Worker, Client]) -> None:
    """A family shares one budget: variations do not each have ten in hand."""
    server, _, client = full
    calls = 300
    for number in range(calls):
        patient = client.prepare(retry=Retry(attempts=5, backoff=0.0001), timeout=PATIENCE + number)
        with pytest.raises(Overloaded):
            patient.call("linger")
    retries = server.stats()["rejected"] - calls
    assert calls * 0.1 < retries <= calls * 0.1 + 10


def test_no_retry_after_the_deadline(full: tuple[Server, Worker, Client]) -> None:
    server, _, client = full
    with pytest.raises(Overloaded):
        client.prepare(retry=Retry(attempts=10, backoff=1e6, backoff_max=1e6)).call("linger")
    assert server.stats()["rejected"] == 1


# -- hedged calls --------------------------------------------------------------------------------------------


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


# -- members that fail again and again -----------------------------------------------------------------------


def test_a_member_that_cannot_be_reached_is_put_aside(
    workers: dict[str, Worker],
    make_node: Callable[..., Node],
    registry: str,
    free_port: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert workers
    caplog.set_level(logging.INFO, "zmqcore.client")
    node = make_node(registry)
    with Client("t", node=node, timeout=PATIENCE) as found:
        good = [member.endpoints[0] for member in found.members()]
    dead = f"tcp://127.0.0.1:{free_port}"
    with Client("t", node=node, timeout=PATIENCE, connect=[*good, dead]) as client:
        began = time.monotonic()
        while not any("failed 5 times" in record.getMessage() for record in caplog.records):
            assert client.call("linger") in "ab"
            assert time.monotonic() < began + PATIENCE
        targets = {target.endpoint: target for target in client._route._balancer._targets}
        assert targets[dead].is_aside(time.monotonic())
        assert Counter(client.call("linger") for _ in range(10)) == {"a": 5, "b": 5}


def test_a_member_that_takes_nothing_new_is_not_put_aside(
    workers: dict[str, Worker], make_node: Callable[..., Node], registry: str
) -> None:
    """It is about to stop, as all are one after the other in a rolling restart: that is no failure."""
    assert workers
    with Client("t", node=make_node(registry), timeout=PATIENCE) as client:
        client.call("linger")
        route = client._route
        balancer = route._balancer

        def aside_after(exc: Exception) -> list[bool]:
            for _ in range(20):
                target = balancer.choose(route.known())
                assert target is not None
                route.failed(target, exc)
            return [target.is_aside(time.monotonic()) for target in balancer._targets]

        assert aside_after(PeerLost("draining", executed_possible=False)) == [False, False]
        assert sorted(aside_after(PeerLost("lost"))) == [False, True]
