"""Channels that have died, with and without a word, and what is no endpoint at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from pool_support import PATIENCE, Far, adds_up, call, cast, until

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore.errors import DeadlineExceeded, InvalidEndpoint, PeerLost, PoolExhausted, Unreachable

MakePool = Callable[..., ChannelPool]


def test_not_an_endpoint(make_pool: MakePool) -> None:
    pool = make_pool(max_sockets=2)
    for text in ("nonsense", "tcp://", "tcp://127.0.0.1", "carrier://pigeon"):
        with pytest.raises((InvalidEndpoint, Unreachable)):
            pool.acquire(text, 0.05)
    stats = pool.stats()
    assert (stats["in_use"], stats["connecting"]) == (0, 0)


def test_a_lost_channel_is_replaced(make_pool: MakePool, context: zmq.Context[Any]) -> None:
    far = Far(context)
    endpoint = far.endpoint(0)
    pool = make_pool(max_sockets=2)
    channel = pool.acquire(endpoint)
    assert call(channel) == b"ok"
    number = far.number
    far.close()
    with pytest.raises((PeerLost, DeadlineExceeded)):
        call(channel)
    again = Far(context, f"tcp://0.0.0.0:{number}")
    fresh = pool.acquire(endpoint)
    assert fresh is not channel
    assert call(fresh) == b"ok"
    assert pool.acquire(endpoint) is fresh, "while the old one is still held by its user"
    stats = pool.stats()
    assert stats["in_use"] == 2, "the old one counts as long as somebody has it"
    adds_up(stats)
    assert {row["leaves_for"] for row in pool.snapshot()} == {"lost", None}
    for each in (channel, fresh, fresh):
        pool.release(each)
    assert pool.stats()["lost"] == 1
    again.close()


def test_stale_channels_go_even_if_the_caller_is_refused(
    make_pool: MakePool, context: zmq.Context[Any]
) -> None:
    far = Far(context)
    pool = make_pool(max_sockets=2, attended=False)
    pool.release(pool.acquire(far.endpoint(0)))
    far.close()
    until(lambda: [channel.look() for channel in pool.channels()] and not pool.channels()[0].usable)
    for _ in range(2):
        with pytest.raises(Unreachable):
            pool.acquire(far.endpoint(0))
    until(lambda: pool.stats()["open"] == 0, "the lost channel's end")
    assert pool.stats()["lost"] == 1


@pytest.fixture
def mute(context: zmq.Context[Any]) -> Iterator[str]:
    """A ROUTER that nobody reads: connections come about, and nothing is ever answered."""
    router = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:*")
    yield router.getsockopt_string(zmq.LAST_ENDPOINT)
    router.close(linger=0)


def test_casts_that_nobody_acknowledges_are_noticed(make_pool: MakePool, mute: str) -> None:
    """Without any call: by the maintenance thread, also while the channel is used all the time."""
    pool = make_pool(max_sockets=2, drain_timeout=0.05, liveness=0.1)
    first = pool.acquire(mute)
    cast(first, b"x")

    def replaced() -> bool:
        channel = pool.acquire(mute)
        pool.release(channel)
        return channel is not first

    until(replaced)
    pool.release(first)
    assert pool.stats()["silent"] == 1


def test_a_frame_that_makes_libzmq_give_up(make_pool: MakePool, context: zmq.Context[Any]) -> None:
    """Over the server's limit: its libzmq cuts the connection. What comes next is answered, on a fresh channel."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.MAXMSGSIZE, 1000)
    router.bind("tcp://127.0.0.1:*")
    endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
    pool = make_pool(max_sockets=1, drain_timeout=0.05)
    channel = pool.acquire(endpoint)
    channel.send("cast", b"topic", "method", b"x" * 5000, None, b"", 0, PATIENCE)
    with pytest.raises((PeerLost, DeadlineExceeded, Unreachable)):
        call(channel, 0.2)
    pool.release(channel)
    seen: list[Channel] = []

    def connected() -> bool:
        try:
            seen.append(pool.acquire(endpoint))
        except (Unreachable, PeerLost, PoolExhausted):
            return False
        return True

    until(connected)
    assert seen[0] is not channel
    cast(seen[0], b"small")
    until(lambda: router.poll(10))
    pool.release(seen[0])
    router.close(linger=0)
