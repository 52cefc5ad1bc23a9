"""Endpoints that name a host: who looks it up, when, and who waits for it. libzmq does not know these names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from clock_support import Clock
from name_support import Names
from pool_support import PATIENCE, Far, adds_up, call
from waiting_support import until

from zmqcore import resolver
from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore.endpoint import numeric
from zmqcore.errors import Closed, Unreachable, ZmqcoreError

MakePool = Callable[..., ChannelPool]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    with Names(monkeypatch) as made:
        yield made


@pytest.fixture
def named_pool(make_pool: MakePool, context: zmq.Context[Any]) -> MakePool:
    """A pool as a node makes it."""

    def make(**options: Any) -> ChannelPool:
        def connect(endpoint: str, address: str) -> Channel:
            return Channel(context, endpoint, address=address)

        return make_pool(connect=connect, resolve=numeric, **options)

    return make


@pytest.fixture
def make_far(context: zmq.Context[Any]) -> Iterator[Callable[[str], Far]]:
    made: list[Far] = []

    def make(bind: str) -> Far:
        made.append(Far(context, bind))
        return made[-1]

    yield make
    for far in made:
        far.close()


def works(pool: ChannelPool, endpoint: str) -> None:
    channel = pool.acquire(endpoint, PATIENCE)
    assert channel.endpoint == endpoint
    assert call(channel) == b"ok"
    pool.release(channel)


def test_libzmq_gets_an_address(named_pool: MakePool, far: Far, names: Names) -> None:
    names.known["far.test"] = ["127.0.0.1"]
    pool = named_pool()
    endpoint = f"tcp://far.test:{far.number}"
    works(pool, endpoint)
    works(pool, endpoint)
    assert [row["endpoint"] for row in pool.snapshot()] == [endpoint]
    assert names.asked == ["far.test"]


def test_each_new_connection_asks_anew(
    named_pool: MakePool, make_far: Callable[[str], Far], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "_REMEMBERED", 0.0)
    names.known["moves.test"] = ["127.0.0.2"]
    pool = named_pool()
    far = make_far("tcp://127.0.0.2:*")
    endpoint = f"tcp://moves.test:{far.number}"
    works(pool, endpoint)
    make_far(f"tcp://127.0.0.3:{far.number}")
    far.close()
    names.known["moves.test"] = ["127.0.0.3"]

    def moved() -> bool:
        try:
            works(pool, endpoint)
        except ZmqcoreError:
            return False
        return True

    until(moved)


def test_one_of_its_addresses_is_dead(
    named_pool: MakePool, make_far: Callable[[str], Far], names: Names
) -> None:
    names.known["half.test"] = ["127.0.0.2", "127.0.0.3"]
    far = make_far("tcp://127.0.0.3:*")
    works(named_pool(), f"tcp://half.test:{far.number}")


def test_a_name_that_is_none(named_pool: MakePool, names: Names, clock: Clock) -> None:
    pool = named_pool(clock=clock, attended=False)
    for _ in range(3):
        with pytest.raises(Unreachable, match=r"nowhere.test: name or service not known \("):
            pool.acquire("tcp://nowhere.test:1")
    assert names.asked == ["nowhere.test"]
    stats = pool.stats()
    assert (stats["unreachable"], stats["negative_hits"], stats["failed"]) == (1, 2, 1)
    adds_up(stats)


def test_nobody_waits_longer_than_he_wants(named_pool: MakePool, far: Far, names: Names) -> None:
    names.known["slow.test"] = ["127.0.0.1"]
    names.answers.clear()
    pool = named_pool(max_sockets=1, connect_timeout=PATIENCE)
    endpoint = f"tcp://slow.test:{far.number}"
    with pytest.raises(Unreachable, match=r"slow\.test: the name has not been resolved yet; 1 attempt"):
        pool.acquire(endpoint, 0.01)
    works(pool, far.endpoint(0))
    patient = threading.Thread(target=works, args=(pool, endpoint))
    patient.start()
    until(lambda: pool.stats()["connecting"] == 1)
    with pytest.raises(Unreachable, match="no connection within"):
        pool.acquire(endpoint, 0.01)  # while another thread waits for the name
    names.answers.set()
    patient.join()
    works(pool, endpoint)
    assert names.asked == ["slow.test"]
    adds_up(pool.stats())


def test_a_name_that_is_not_resolved_is_a_failure(named_pool: MakePool, names: Names, clock: Clock) -> None:
    names.answers.clear()
    pool = named_pool(connect_timeout=0.05, clock=clock, attended=False)
    with pytest.raises(Unreachable, match=r"the name has not been resolved yet \(tried for .*; 1 attempt"):
        pool.acquire("tcp://silent.test:1")
    with pytest.raises(Unreachable, match="known from before"):
        pool.acquire("tcp://silent.test:1")


def test_closing_wakes_who_waits_for_a_name(named_pool: MakePool, names: Names) -> None:
    names.answers.clear()
    pool = named_pool(connect_timeout=PATIENCE)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            pool.acquire("tcp://silent.test:1", PATIENCE)
        except BaseException as exc:  # noqa: BLE001 - looked at by the test
            errors.append(exc)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: names.asked)
    pool.close()
    for thread in threads:
        thread.join()
    assert [type(exc) for exc in errors] == [Closed] * 3
