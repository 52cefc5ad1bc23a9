"""Messages to an endpoint keep their order, also when the channel that carries them is evicted or expires."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pool_support import Far, adds_up, call, cast
from waiting_support import until

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool

MakePool = Callable[..., ChannelPool]


class Acquired(threading.Thread):
    """A thread that waits in acquire()."""

    def __init__(self, pool: ChannelPool, endpoint: str) -> None:
        super().__init__()
        self.pool, self.endpoint = pool, endpoint
        self.channel: Channel | None = None
        waiting = pool.stats()["waiting"]
        self.start()
        until(lambda: self.channel is not None or pool.stats()["waiting"] > waiting)

    def run(self) -> None:
        self.channel = self.pool.acquire(self.endpoint)


def numbers(first: int, last: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, last)]


def stop_reading(far: Far, channel: Channel) -> None:
    """Have the server take one more message, on ``channel``, and then no other."""
    far.reading.clear()
    assert call(channel) == b"ok"


def send(pool: ChannelPool, endpoint: str, first: int, last: int) -> Channel:
    channel = pool.acquire(endpoint)
    for number in numbers(first, last):
        cast(channel, number)
    pool.release(channel)
    return channel


def test_across_an_expiry(make_pool: MakePool, far: Far) -> None:
    """The server reads nothing until both halves are under way: on two connections it would take them alternately."""
    clock = [1000.0]
    pool = make_pool(attended=False, max_sockets=4, idle_ttl=10.0, clock=lambda: clock[0])
    first = send(pool, far.endpoint(0), 0, 0)
    stop_reading(far, first)
    assert send(pool, far.endpoint(0), 0, 50) is first
    clock[0] += 1000.0
    pool.maintain()
    assert pool.stats()["draining"] == 1
    again = send(pool, far.endpoint(0), 50, 100)
    assert again is first
    assert pool.stats()["revived"] == 1
    far.reading.set()
    until(lambda: len(far.taken) == 100)
    assert far.taken == numbers(0, 100)
    adds_up(pool.stats())


def test_across_an_eviction(make_pool: MakePool, far: Far) -> None:
    """Who wants the evicted endpoint again waits behind the one it was evicted for, and gets the same channel."""
    pool = make_pool(max_sockets=2)
    held = pool.acquire(far.endpoint(1))
    send(pool, far.endpoint(0), 0, 0)
    stop_reading(far, held)
    first = send(pool, far.endpoint(0), 0, 50)
    assert not first.clean
    other = Acquired(pool, far.endpoint(2))
    until(lambda: pool.stats()["draining"] == 1, "the eviction")
    again = Acquired(pool, far.endpoint(0))
    assert (other.channel, again.channel) == (None, None)
    pool.release(held)
    for thread in (other, again):
        thread.join()
    assert other.channel is not None
    assert again.channel is first
    for number in numbers(50, 100):
        cast(first, number)
    far.reading.set()
    until(lambda: len(far.taken) == 100)
    assert far.taken == numbers(0, 100)
    pool.release(first)
    pool.release(other.channel)
    stats = pool.stats()
    assert (stats["revived"], stats["lost_while_draining"]) == (1, 0)
    adds_up(stats)


def test_what_was_taken_back_is_not_given_up_at_the_end_of_its_drain(make_pool: MakePool, far: Far) -> None:
    clock = [1000.0]
    pool = make_pool(max_sockets=4, idle_ttl=10.0, drain_timeout=0.05, clock=lambda: clock[0])
    send(pool, far.endpoint(0), 0, 0)
    held = pool.acquire(far.endpoint(1))
    stop_reading(far, held)
    first = send(pool, far.endpoint(0), 0, 1)
    clock[0] += 1000.0
    pool.maintain()
    assert pool.acquire(far.endpoint(0)) is first
    # Has the attendant look after the channel.
    pending = first.submit(b"topic", "method", b"", None, b"", 0, 1.0, lambda _: None)
    until(lambda: pending.done, "a multiple of drain_timeout")
    assert first.usable
    far.reading.set()
    assert call(first) == b"ok"
    pool.release(first)
    pool.release(held)
