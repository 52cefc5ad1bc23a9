"""What is tried again elsewhere or later, what is not, and which members are put aside."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from waiting_support import PATIENCE
from worker_support import Worker, lingering, settled

import zmqcore
from zmqcore import AsyncClient, Client, Closed, DeadlineExceeded, Node, Overloaded, PeerLost, Retry, Server
from zmqcore.rpc import deadline as deadlines

Serve = Callable[..., Server]
Connect = Callable[..., Client]
Peers = Callable[..., Any]
Running = Callable[..., Any]
Until = Callable[..., None]


# -- a member is lost ----------------------------------------------------------------------------------------


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


def failures(client: Client | AsyncClient) -> list[int]:
    return [target.failures for target in client._route._balancer._targets]


def test_a_deadline_that_had_passed_is_no_failure_of_a_member(
    both: Client, serve: Serve, connect: Connect, until: Until
) -> None:
    refused = 0

    def relay() -> None:
        nonlocal refused
        while zmqcore.time_left():
            time.sleep(0.001)
        for _ in range(20):
            try:
                both.call("linger")
            except DeadlineExceeded:
                refused += 1

    serve("relay", {"relay": relay})
    with pytest.raises(DeadlineExceeded):
        connect("relay", timeout=0.1).call("relay")
    until(lambda: refused == 20)
    assert failures(both) == [0, 0]


def test_a_deadline_of_coroutines_that_had_passed_is_none_either(
    workers: dict[str, Worker], make_node: Callable[..., Node], registry: str
) -> None:
    assert workers
    node = make_node(registry)

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            assert {await client.call("linger") for _ in range(4)} == {"a", "b"}
            deadlines.current.set(time.monotonic() - 1.0)
            for _ in range(20):
                with pytest.raises(DeadlineExceeded):
                    await client.call("linger")
            assert failures(client) == [0, 0]

    asyncio.run(main())


def test_a_node_that_is_closed_is_no_failure_of_a_member(
    workers: dict[str, Worker], make_node: Callable[..., Node], registry: str
) -> None:
    node = make_node(registry)
    client = Client("t", node=node, timeout=PATIENCE)
    calls = [client.submit("linger", "a", "b") for _ in range(2)]
    for worker in workers.values():
        assert worker.entered.acquire(timeout=PATIENCE)
    node.close(0.0)
    for call in calls:
        assert isinstance(call.exception(PATIENCE), Closed)
    assert failures(client) == [0, 0]
