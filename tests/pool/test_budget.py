"""The budget with real sockets: the cap is hard, and what is evicted loses nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import zmq
from pool_support import PATIENCE, Far, adds_up, call, cast
from waiting_support import until

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool, default_max_sockets
from zmqcore.errors import DeadlineExceeded, PoolExhausted, ZmqcoreError

MakePool = Callable[..., ChannelPool]

FDS = Path("/proc/self/fd")
pytestmark = pytest.mark.skipif(not FDS.is_dir(), reason="needs /proc")


class Sampler:
    """Count descriptors as fast as possible, and check the pool's numbers each time."""

    def __init__(self, pool: ChannelPool) -> None:
        self.peak = self.samples = 0
        self.failure: AssertionError | None = None
        self._pool = pool
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, len(os.listdir(FDS)))  # noqa: PTH208 (no object per entry: it has to be quick)
            self.samples += 1
            try:
                adds_up(self._pool.stats())
            except AssertionError as exc:
                self.failure = exc
            time.sleep(0.0005)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure


def in_threads(number: int, work: Any) -> None:
    failures: list[BaseException] = []

    def run(k: int) -> None:
        try:
            work(k)
        except BaseException as exc:  # noqa: BLE001 (raised below)
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_the_cap_is_hard(make_pool: MakePool, context: zmq.Context[Any], far_process: FarProcess) -> None:
    """Twenty times as many endpoints as sockets, from eight threads: two descriptors for each, and one for a thread."""
    context.socket(zmq.PAIR).close()  # the context's own descriptors are there from here on
    pool = make_pool(max_sockets=32)
    threads, before = 8, len(os.listdir(FDS))  # noqa: PTH208

    def work(k: int) -> None:
        for i in range(k, 640, threads):
            channel = pool.acquire(far_process.endpoint(i))
            try:
                assert call(channel) == b"ok"
            finally:
                pool.release(channel)

    with Sampler(pool) as sampler:
        in_threads(threads, work)
    stats = pool.stats()
    assert stats["acquired"] == 640
    assert stats["opened"] == 640
    assert sampler.samples > 10
    # The rest: the waiting threads' eventfds and their probes, the watch on closing sockets, the attendant's pipe,
    # and the sampler's own.
    assert sampler.peak <= before + 2 * 32 + 2 * threads + 4
    pool.close()
    assert pool.stats()["open"] == 0


def test_what_channels_have_counted_stays_when_they_go(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=2)
    channel = pool.acquire(far.endpoint(0))
    assert set(pool.stats()["messages"]) == set(channel.stats()) - {
        "outstanding_calls", "window_messages", "window_bytes", "retained", "retained_bytes",
    }  # fmt: skip
    far.reading.clear()
    with contextlib.suppress(DeadlineExceeded):
        for _ in range(3):  # one may still be received
            call(channel, 0.05)
    far.reading.set()
    assert call(channel) == b"ok"
    calls = channel.stats()["calls"]
    pool.release(channel)
    for i in range(1, 10):
        channel = pool.acquire(far.endpoint(i))
        assert call(channel) == b"ok"
        pool.release(channel)
        counted = pool.stats()["messages"]
        assert counted["calls"] == calls + i
        assert counted["replies"] == counted["calls"] - 1
        assert counted["timeouts"] == 1
    before = pool.stats()["messages"]
    pool.close()
    assert pool.stats()["open"] == 0
    assert pool.stats()["messages"] == before


def test_holders_of_many_threads(make_pool: MakePool, far: Far) -> None:
    """Whoever begins to wait asks all of them, those that have gone excepted."""

    class Holder:
        asked = 0

        def give_way(self) -> None:
            self.asked += 1

    pool = make_pool(max_sockets=1)
    kept = [Holder() for _ in range(80)]

    def add(k: int) -> None:
        for holder in kept[k::8]:
            pool.add_holder(holder)
            pool.add_holder(Holder())

    in_threads(8, add)
    channel = pool.acquire(far.endpoint(0))
    with pytest.raises(PoolExhausted):
        pool.acquire(far.endpoint(1), 0.01)
    pool.release(channel)
    assert {holder.asked for holder in kept} == {1}


class FarProcess:
    """As Far, in a process of its own: so that the descriptors of the accepting side are not ours."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self._stop_read, self._stop = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                context: zmq.Context[Any] = zmq.Context()
                far = Far(context)
                os.write(write, str(far.number).encode() + b"\n")
                os.close(self._stop)
                os.read(self._stop_read, 1)
            finally:
                os._exit(0)
        os.close(write)
        os.close(self._stop_read)
        self.number = int(os.read(self._read, 100))
        os.close(self._read)

    endpoint = Far.endpoint

    def close(self) -> None:
        os.close(self._stop)
        os.waitpid(self.pid, 0)


@pytest.fixture
def far_process() -> Iterator[FarProcess]:
    made = FarProcess()
    yield made
    made.close()


@pytest.mark.parametrize("attended", [True, False])
def test_eviction_loses_no_cast(make_pool: MakePool, far: Far, attended: bool) -> None:
    """With and without a thread that attends to what drains: whoever waits does it otherwise."""
    pool = make_pool(max_sockets=4, attended=attended)
    bodies = [str(i).encode() for i in range(1000)]

    def work(k: int) -> None:
        rng = random.Random(k)
        for body in bodies[k::4]:
            channel = pool.acquire(far.endpoint(rng.randrange(50)))
            cast(channel, body)
            pool.release(channel)

    in_threads(4, work)
    until(lambda: len(far.taken) == len(bodies), "arrival of all casts")
    assert sorted(far.taken) == sorted(bodies)
    stats = pool.stats()
    assert stats["evicted_draining"] > 0
    assert stats["lost_while_draining"] == 0
    adds_up(stats)


def test_eviction_waits_for_answers(make_pool: MakePool, far: Far) -> None:
    """A call that was submitted, and whose channel was given back and evicted, still gets its reply."""
    pool = make_pool(max_sockets=1)
    channel = pool.acquire(far.endpoint(0))
    far.reading.clear()
    pool.release(pool.acquire(far.endpoint(0)))
    pending = [
        channel.submit(b"topic", "method", b"x", None, b"", 0, PATIENCE, lambda _: None) for _ in range(10)
    ]
    pool.release(channel)
    waiting = threading.Thread(target=lambda: pool.release(pool.acquire(far.endpoint(1), PATIENCE)))
    waiting.start()
    until(lambda: pool.stats()["draining"] == 1 or all(p.done for p in pending))
    far.reading.set()
    waiting.join()
    assert [bytes(p.envelope().body) for p in pending] == [b"ok"] * 10
    stats = pool.stats()
    assert (stats["drained"], stats["lost_while_draining"]) == (1, 0)


def test_what_drains_for_long_does_not_hold_the_others_up(
    make_pool: MakePool, context: zmq.Context[Any], far: Far
) -> None:
    """A channel whose peer acknowledges nothing is evicted, and keeps its place: then the next one goes as well."""
    silent = context.socket(zmq.ROUTER)
    silent.bind("tcp://127.0.0.1:*")
    pool = make_pool(max_sockets=2, drain_timeout=PATIENCE)
    channel = pool.acquire(silent.getsockopt_string(zmq.LAST_ENDPOINT))
    cast(channel, b"never acknowledged")
    pool.release(channel)
    held = pool.acquire(far.endpoint(0))
    got: list[Channel] = []
    waiting = threading.Thread(target=lambda: got.append(pool.acquire(far.endpoint(1))))
    waiting.start()
    until(lambda: pool.stats()["draining"] == 1)
    pool.release(held)
    waiting.join()
    assert call(got[0]) == b"ok"
    stats = pool.stats()
    assert (stats["draining"], stats["evicted_draining"], stats["evicted_clean"]) == (1, 1, 1)
    pool.release(got[0])
    silent.close(linger=0)


def test_a_drain_ends(make_pool: MakePool, context: zmq.Context[Any], far: Far) -> None:
    silent = context.socket(zmq.ROUTER)
    silent.bind("tcp://127.0.0.1:*")
    pool = make_pool(max_sockets=1, drain_timeout=0.05)
    channel = pool.acquire(silent.getsockopt_string(zmq.LAST_ENDPOINT))
    cast(channel, b"never acknowledged")
    pool.release(channel)
    pool.release(pool.acquire(far.endpoint(0)))
    assert pool.stats()["lost_while_draining"] == 1
    silent.close(linger=0)


# -- ways out on which a place could be lost ------------------------------------------------------------------


def test_a_channel_that_cannot_be_made_costs_no_place(make_pool: MakePool, far: Far, context: Any) -> None:
    failing: list[BaseException] = [
        zmq.ZMQError(errno.EMFILE),
        MemoryError(),
        KeyboardInterrupt(),
        OSError(errno.EIO, "?"),
        RuntimeError("from configure"),
        zmq.ZMQError(errno.EINVAL),
    ]

    def connect(endpoint: str) -> Channel:
        if failing:
            raise failing.pop(0)
        return Channel(context, endpoint)

    pool = make_pool(max_sockets=1, connect=connect)
    for expected in (PoolExhausted, MemoryError, KeyboardInterrupt, OSError, RuntimeError, ValueError):
        with pytest.raises(expected):
            pool.acquire(far.endpoint(0))
        adds_up(pool.stats())
    pool.release(pool.acquire(far.endpoint(0)))
    assert pool.stats()["failed"] == 6


def test_a_maintenance_thread_that_cannot_start_costs_nothing(make_pool: MakePool, far: Far) -> None:
    asked = []

    def maintenance(pool: ChannelPool) -> None:
        asked.append(pool)
        if len(asked) < 3:
            raise RuntimeError("can't start new thread")

    pool = make_pool(max_sockets=4, maintenance=maintenance)
    for i in range(2):
        pool.release(pool.acquire(far.endpoint(i)))
    assert len(asked) == 1, "not at each use: that would cost more than the thread"
    for i in range(12):
        pool.release(pool.acquire(far.endpoint(i % 4)))
    assert len(asked) == 3
    assert pool.stats()["idle"] == 4


def test_a_single_use_is_enough_to_be_maintained(make_pool: MakePool, far: Far) -> None:
    asked: list[ChannelPool] = []
    pool = make_pool(max_sockets=4, maintenance=asked.append)
    for _ in range(3):
        pool.call(far.endpoint(0), b"t", "m", b"x", None, b"", 0, PATIENCE)
        assert asked == [pool]


@pytest.mark.parametrize(
    ("limit", "sockets"), [(16, 1), (25, 1), (32, 4), (40, 8), (128, 8), (160, 16), (1024, 384)]
)
def test_the_default_fits_the_limit(monkeypatch: pytest.MonkeyPatch, limit: int, sockets: int) -> None:
    """With 9 descriptors more, see pool.md, and the standard ones."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert default_max_sockets() == sockets
    assert 2 * sockets + 9 + 3 <= limit


def test_at_the_limit_of_descriptors(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=10_000)
    pool.release(pool.acquire(far.endpoint(0)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    failures: list[ZmqcoreError] = []
    gc.collect()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir(FDS)) + 24, hard))  # noqa: PTH208
    try:
        for i in range(1, 64):
            try:
                pool.release(pool.acquire(far.endpoint(i), 1.0))
            except ZmqcoreError as exc:
                failures.append(exc)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert any("descriptor" in str(failure) for failure in failures), failures[:3]
    adds_up(pool.stats())
    until(lambda: not pool.stats()["closing"])
    for i in range(64):
        with contextlib.suppress(ConnectionError):  # still known as not reachable, for a moment
            pool.release(pool.acquire(far.endpoint(i)))
    stats = pool.stats()
    assert stats["in_use"] == stats["connecting"] == 0


class Untidy:
    """Garbage, in a cycle, whose destructor uses the pool."""

    def __init__(self, pool: ChannelPool, endpoint: str) -> None:
        self.me = self
        self.pool, self.endpoint = pool, endpoint

    def __del__(self) -> None:
        channel = self.pool.acquire_open(self.endpoint)
        if channel is not None:
            self.pool.release(channel)
        self.pool.stats()


@pytest.mark.untraced(
    "the tracer makes objects at each line, and so garbage collections where the sources have none"
)
def test_a_destructor_may_use_the_pool(make_pool: MakePool, far: Far) -> None:
    """The collector may run wherever an object is made, but not while the pool's lock is held."""
    pool = make_pool(max_sockets=4)
    threshold = gc.get_threshold()
    try:
        gc.set_threshold(1)
        for i in range(300):
            Untidy(pool, far.endpoint(i % 7))
            pool.release(pool.acquire(far.endpoint(i % 7)))
            pool.snapshot()
            pool.maintain()
    finally:
        gc.set_threshold(*threshold)
    assert gc.isenabled()
    adds_up(pool.stats())


def test_giving_back_too_often_or_to_a_stranger(make_pool: MakePool, far: Far, context: Any) -> None:
    pool, other = make_pool(max_sockets=2), make_pool(max_sockets=2)
    channel = pool.acquire(far.endpoint(0))
    other.release(channel)
    assert pool.stats()["in_use"] == 1
    pool.release(channel)
    pool.release(channel)
    assert (pool.stats()["in_use"], pool.stats()["idle"]) == (0, 1)
    bare = Channel(context, far.endpoint(1))
    with pytest.raises(ZmqcoreError, match="does not belong to a pool"):
        pool.release(bare)
    bare.close()
    for each in (pool, other):
        adds_up(each.stats())
