"""The pool: taking a channel and giving it back, warm, over many endpoints, and at the cap.

The other end is a ROUTER, bound to many endpoints and never read: nothing is sent but what connecting takes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import zmq
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool

TIMEOUT = 10.0

MakePool = Callable[[int], ChannelPool]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made.set(zmq.MAX_SOCKETS, made.get(zmq.SOCKET_LIMIT))
    yield made
    made.destroy(linger=0)


@pytest.fixture
def endpoints(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[list[str]]:
    """Return 100 endpoints, all of one ROUTER, which listens on all of 127.0.0.0/8."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVHWM, 0)
    found = []
    for _ in range(100):
        router.bind("tcp://0.0.0.0:*")
        found.append(router.getsockopt_string(zmq.LAST_ENDPOINT).replace("0.0.0.0", "127.0.0.1"))
    yield found
    router.close(linger=0)


@pytest.fixture
def make_pool(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[MakePool]:
    made: list[ChannelPool] = []

    def make(max_sockets: int) -> ChannelPool:
        made.append(ChannelPool(lambda endpoint: Channel(context, endpoint), max_sockets=max_sockets))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def use(pool: ChannelPool, endpoint: str) -> None:
    pool.release(pool.acquire(endpoint, TIMEOUT))


@pytest.mark.benchmark(group="pool: acquire and release")
def test_one_endpoint(benchmark: BenchmarkFixture, make_pool: MakePool, endpoints: list[str]) -> None:
    pool = make_pool(8)
    benchmark(use, pool, endpoints[0])
    assert pool.stats()["opened"] == 1


@pytest.mark.benchmark(group="pool: acquire and release")
def test_100_endpoints(benchmark: BenchmarkFixture, make_pool: MakePool, endpoints: list[str]) -> None:
    """Round robin over 100 kept channels; the cost must not grow with their number."""
    pool = make_pool(100)
    for endpoint in endpoints:
        use(pool, endpoint)
    turn = itertools.cycle(endpoints)
    benchmark(lambda: use(pool, next(turn)))
    assert pool.stats()["opened"] == 100


@pytest.mark.benchmark(group="pool: acquire and release")
def test_over_the_cap(benchmark: BenchmarkFixture, make_pool: MakePool, endpoints: list[str]) -> None:
    """Round robin over 100 endpoints with room for 50: each time one is evicted and another connects."""
    pool = make_pool(50)
    for endpoint in endpoints:
        use(pool, endpoint)
    turn = itertools.cycle(endpoints)
    benchmark(lambda: use(pool, next(turn)))
    stats = pool.stats()
    assert stats["reused"] == 0
    assert stats["opened"] > 50 >= stats["open"]


@pytest.mark.benchmark(group="pool: acquire and release")
def test_acquire_open(benchmark: BenchmarkFixture, make_pool: MakePool, endpoints: list[str]) -> None:
    """What a call does first, before it is known whether the channel is open."""
    pool = make_pool(8)
    use(pool, endpoints[0])

    def use_open() -> None:
        channel = pool.acquire_open(endpoints[0])
        assert channel is not None
        pool.release(channel)

    benchmark(use_open)
    assert (pool.stats()["opened"], pool.stats()["in_use"]) == (1, 0)


@pytest.mark.benchmark(group="pool: one operation")
def test_acquire_open_finds_none(
    benchmark: BenchmarkFixture, make_pool: MakePool, endpoints: list[str]
) -> None:
    pool = make_pool(8)
    assert benchmark(pool.acquire_open, endpoints[0]) is None
    assert pool.stats()["opened"] == 0


@pytest.mark.benchmark(group="pool: one operation")
def test_release(benchmark: BenchmarkFixture, make_pool: MakePool, endpoints: list[str]) -> None:
    """Only the release is timed; every one parks the channel, as its only user."""
    pool = make_pool(8)

    def acquire() -> tuple[tuple[Channel], dict[str, object]]:
        return (pool.acquire(endpoints[0], TIMEOUT),), {}

    benchmark.pedantic(pool.release, setup=acquire, rounds=5000)
    assert (pool.stats()["opened"], pool.stats()["in_use"]) == (1, 0)


@pytest.fixture
def thousand(make_pool: MakePool, endpoints: list[str]) -> ChannelPool:
    """Return a pool that holds 1000 open channels: to ten addresses for each of the endpoints."""
    pool = make_pool(1000)
    for address in range(10):
        for endpoint in endpoints:
            use(pool, endpoint.replace("127.0.0.1", f"127.0.0.{1 + address}"))
    return pool


@pytest.mark.benchmark(group="pool: 1000 channels")
def test_stats(benchmark: BenchmarkFixture, thousand: ChannelPool) -> None:
    assert benchmark(thousand.stats)["idle"] == 1000


@pytest.mark.benchmark(group="pool: 1000 channels")
def test_snapshot(benchmark: BenchmarkFixture, thousand: ChannelPool) -> None:
    rows = benchmark(thousand.snapshot)
    assert len({row["endpoint"] for row in rows}) == 1000


@pytest.mark.benchmark(group="pool: 8 threads")
def test_8_threads(benchmark: BenchmarkFixture, make_pool: MakePool, endpoints: list[str]) -> None:
    """Eight threads, 1000 times each, on one channel."""
    pool = make_pool(8)
    use(pool, endpoints[0])

    def work() -> None:
        for _ in range(1000):
            use(pool, endpoints[0])

    def eight() -> None:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    benchmark(eight)
    stats = pool.stats()
    assert (stats["opened"], stats["in_use"]) == (1, 0)
