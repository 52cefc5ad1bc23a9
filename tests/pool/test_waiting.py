"""At the cap with everything in use: the queue."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pool_support import PATIENCE, Far, adds_up, call
from waiting_support import until

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore.errors import Closed, PoolExhausted, ZmqcoreError

MakePool = Callable[..., ChannelPool]


class Caller(threading.Thread):
    """Acquires in a thread of its own; holds until ``go``."""

    def __init__(
        self, pool: ChannelPool, endpoint: str, timeout: float = PATIENCE, hold: bool = True
    ) -> None:
        super().__init__()
        self.pool, self.endpoint, self.timeout = pool, endpoint, timeout
        self.has = threading.Event()
        self.go = threading.Event()
        self.error: BaseException | None = None
        if not hold:
            self.go.set()
        self.start()

    def run(self) -> None:
        try:
            channel = self.pool.acquire(self.endpoint, self.timeout)
        except BaseException as exc:  # noqa: BLE001 (looked at by the test)
            self.error = exc
            return
        self.has.set()
        self.go.wait()
        self.pool.release(channel)


def queue_up(pool: ChannelPool, endpoints: list[str], **options: Any) -> list[Caller]:
    callers = []
    for endpoint in endpoints:
        n = pool.stats()["waiting"]
        callers.append(Caller(pool, endpoint, **options))
        until(lambda n=n: pool.stats()["waiting"] == n + 1)
    return callers


def test_first_come_first_served(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=1)
    held = pool.acquire(far.endpoint(0))
    callers = queue_up(pool, [far.endpoint(i) for i in range(1, 9)])
    pool.release(held)
    for i, caller in enumerate(callers):
        assert caller.has.wait(PATIENCE)
        assert not any(later.has.is_set() for later in callers[i + 1 :])
        caller.go.set()
        caller.join()
    stats = pool.stats()
    assert (stats["waits"], stats["wait_timeouts"]) == (8, 0)
    assert sum(stats["wait_seconds"].values()) == 8
    assert 0 < stats["longest_wait_seconds"] <= stats["waited_seconds"]


def test_those_who_wait_for_one_endpoint_share_its_place(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=1)
    held = pool.acquire(far.endpoint(0))
    callers = queue_up(pool, [far.endpoint(1), far.endpoint(2), far.endpoint(1)])
    pool.release(held)
    assert callers[0].has.wait(PATIENCE)
    assert callers[2].has.wait(PATIENCE)
    assert not callers[1].has.is_set()
    for caller in (callers[0], callers[2], callers[1]):
        caller.go.set()
        caller.join()
    assert pool.stats()["acquired"] == 4


def test_a_deadline_and_its_numbers(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=2)
    held = [pool.acquire(far.endpoint(i)) for i in range(2)]
    with pytest.raises(PoolExhausted) as raised:
        pool.acquire(far.endpoint(2), 0.05)
    text = str(raised.value)
    assert (
        "all 2 sockets of the pool are taken: 2 in use, 0 idle, 0 idle but pinned, 0 draining, 0 closing"
        in text
    )
    assert re.search(r"; waited [0-9.]+ s for a socket to ", text)
    assert far.endpoint(2) in text
    assert isinstance(raised.value, TimeoutError)
    assert pool.stats()["wait_timeouts"] == 1
    assert pool.stats()["waiting"] == 0
    for channel in held:
        pool.release(channel)


def test_the_default_deadline_is_the_pools(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=1, acquire_timeout=0.02)
    held = pool.acquire(far.endpoint(0))
    with pytest.raises(PoolExhausted):
        pool.acquire(far.endpoint(1))
    pool.release(held)


def test_too_many_are_refused_at_once(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=1, max_waiting=2)
    held = pool.acquire(far.endpoint(0))
    callers = queue_up(pool, [far.endpoint(1), far.endpoint(2)], hold=False)
    with pytest.raises(
        PoolExhausted, match=r"2 threads wait already \(limit 2\), so tcp://.* was refused at once"
    ):
        pool.acquire(far.endpoint(3))
    pool.release(held)
    for caller in callers:
        caller.join()
        assert caller.error is None
    assert pool.stats()["refused"] == 1


def test_nobody_is_refused_while_an_idle_channel_can_give_way(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=1, max_waiting=0)
    for i in range(3):
        pool.release(pool.acquire(far.endpoint(i)))
    held = pool.acquire(far.endpoint(0))
    with pytest.raises(PoolExhausted, match=r"1 in use, 0 idle, .*; 0 threads wait already \(limit 0\)"):
        pool.acquire(far.endpoint(1))
    pool.release(held)
    assert pool.stats()["refused"] == 1


def test_nested_acquires_at_cap_1_end(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=1)
    outer = pool.acquire(far.endpoint(0))
    inner = pool.acquire(far.endpoint(0))
    assert inner is outer
    with pytest.raises(PoolExhausted):
        pool.acquire(far.endpoint(1), 0.02)
    pool.release(inner)
    pool.release(outer)
    pool.release(pool.acquire(far.endpoint(1)))


def test_who_gave_up_never_gets_a_channel(make_pool: MakePool, far: Far) -> None:
    """Deadlines that end just when a place comes free: whoever loses that race leaves nothing behind."""
    pool = make_pool(max_sockets=2)
    outcomes: list[bool] = []
    stop = threading.Event()

    def work(k: int) -> None:
        rng = random.Random(k)
        while not stop.is_set():
            try:
                channel = pool.acquire(far.endpoint(rng.randrange(40)), rng.random() * 0.002)
            except (PoolExhausted, ConnectionError):
                outcomes.append(False)
            else:
                outcomes.append(True)
                time.sleep(rng.random() * 0.0005)
                pool.release(channel)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: outcomes.count(False) > 1500 and outcomes.count(True) > 300, "enough of both outcomes")
    stop.set()
    for thread in threads:
        thread.join()
    stats = pool.stats()
    adds_up(stats)
    assert (stats["in_use"], stats["connecting"], stats["waiting"]) == (0, 0, 0)
    assert stats["acquired"] == outcomes.count(True)
    for i in range(100, 104):
        channel = pool.acquire(far.endpoint(i))
        assert call(channel) == b"ok"
        pool.release(channel)


def test_64_threads_at_cap_4(make_pool: MakePool, far: Far) -> None:
    """All get one in the end."""
    pool = make_pool(max_sockets=4)
    served: list[int] = []
    errors: list[BaseException] = []
    start = threading.Barrier(64)

    def work(k: int) -> None:
        start.wait()
        for _ in range(6):
            try:
                channel = pool.acquire(far.endpoint(k), PATIENCE)
            except ZmqcoreError as exc:
                errors.append(exc)
                return
            served.append(k)
            call(channel)
            pool.release(channel)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(served) == 64 * 6
    adds_up(pool.stats())


def test_close_wakes_everybody(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=1)
    held = pool.acquire(far.endpoint(0))
    callers = queue_up(pool, [far.endpoint(i) for i in range(1, 6)])
    assert pool.close()
    for caller in callers:
        caller.join()
        assert isinstance(caller.error, Closed), caller.error
    assert held.state_name == "closed"
    pool.release(held)
    adds_up(pool.stats())
    assert pool.stats()["open"] == 0
    with pytest.raises(Closed):
        pool.acquire(far.endpoint(0))


def test_close_while_a_channel_is_made(make_pool: MakePool, far: Far, context: Any) -> None:
    """What was being made when the pool was closed is closed, too."""
    made: list[Channel] = []
    making, go_on = threading.Event(), threading.Event()

    def connect(endpoint: str) -> Channel:
        making.set()
        go_on.wait()
        made.append(Channel(context, endpoint))
        return made[-1]

    pool = make_pool(max_sockets=2, connect=connect)
    caller = Caller(pool, far.endpoint(0))
    making.wait()
    follower = Caller(pool, far.endpoint(0))
    until(lambda: pool.stats()["waits"] == 1)
    pool.close()
    go_on.set()
    caller.join()
    follower.join()
    assert isinstance(caller.error, Closed)
    assert isinstance(follower.error, Closed)
    assert made[0].state_name == "closed"
    adds_up(pool.stats())


class Signalled(Exception):
    pass


# A socket that was interrupted while it was made is closed by its destructor, which says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_signals_at_any_point(make_pool: MakePool, far: Far) -> None:
    """A signal handler that raises, again and again while channels are taken and given back: no place is lost."""
    pool = make_pool(max_sockets=3, drain_timeout=0.2)
    armed = False

    def handler(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Signalled

    previous = signal.signal(signal.SIGALRM, handler)
    rng = random.Random(3)
    raised = 0
    held: list[Channel] = []
    stop = threading.Event()

    def others() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            pool.release(pool.acquire(far.endpoint(1000 + n % 9)))

    rival = threading.Thread(target=others)
    rival.start()
    try:
        while raised < 150:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + rng.random() * 2e-3)
                for _ in range(6):
                    # Python looks for signals when a call has returned, before the result has a name. Here it has
                    # been put into the list by then.
                    held.extend(map(pool.acquire, [far.endpoint(rng.randrange(12))]))
                    pool.release(held[-1])
                    held.pop()
            except Signalled:
                raised += 1
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            while held:
                pool.release(held.pop())  # perhaps for the second time, which is ignored
    finally:
        stop.set()
        rival.join()
        signal.signal(signal.SIGALRM, previous)
    until(lambda: pool.maintain() is None or not pool.stats()["draining"])
    stats = pool.stats()
    adds_up(stats)
    assert (stats["connecting"], stats["in_use"], stats["waiting"]) == (0, 0, 0)
    for i in range(2000, 2010):
        pool.release(pool.acquire(far.endpoint(i), PATIENCE))
