"""Who keeps a socket: scans, hot and cold endpoints, learnt and fixed time to live. The clock is the test's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from clock_support import Clock
from pool_support import Far, adds_up, call
from waiting_support import until

from zmqcore._pool import ChannelPool

MakePool = Callable[..., ChannelPool]


def use(pool: ChannelPool, endpoint: str) -> None:
    pool.release(pool.acquire(endpoint))


def open_endpoints(pool: ChannelPool) -> set[str]:
    return {row["endpoint"] for row in pool.snapshot() if row["state"] in ("idle", "in use")}


def test_least_recently_used_goes_first(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=4)
    a, b, c, d, e, f = (far.endpoint(i) for i in range(6))
    for endpoint in (a, b, c, d, a):
        use(pool, endpoint)
    use(pool, e)
    assert open_endpoints(pool) == {a, c, d, e}
    use(pool, f)
    assert open_endpoints(pool) == {a, d, e, f}


def test_in_use_is_never_evicted(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=4)
    held = [pool.acquire(far.endpoint(i)) for i in range(3)]
    for i in range(3, 20):
        use(pool, far.endpoint(i))
    for channel in held:
        assert call(channel) == b"ok"
        pool.release(channel)


def test_the_protected_ring_is_bounded_and_its_oldest_is_demoted(make_pool: MakePool, far: Far) -> None:
    """At cap 10 eight are protected; of nine that come back the one that came back first is on probation again."""
    pool = make_pool(max_sockets=10)
    hot = [far.endpoint(i) for i in range(9)]
    for endpoint in hot:
        use(pool, endpoint)
    for i in range(9, 14):
        use(pool, far.endpoint(i))  # only the tenth place takes part: the ring's least recent would go first
        for endpoint in hot:
            use(pool, endpoint)
    rows = {row["endpoint"]: row for row in pool.snapshot()}
    assert [rows[endpoint]["protected"] for endpoint in hot] == [False, *[True] * 8]
    assert pool.stats()["protected"] == 8


def test_one_who_was_demoted_has_to_come_back_after_others(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=10)
    hot = [far.endpoint(i) for i in range(9)]
    for endpoint in hot:
        use(pool, endpoint)
    for i in range(9, 14):
        use(pool, far.endpoint(i))
        for endpoint in hot:
            use(pool, endpoint)
    use(pool, hot[0])
    assert {row["endpoint"]: row["protected"] for row in pool.snapshot()}[hot[0]] is False


def test_a_scan_passes_by_the_hot_ones(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=16)
    hot = {far.endpoint(i) for i in range(8)}
    for round_ in range(3):
        for endpoint in hot:
            use(pool, endpoint)
        for i in range(4):
            use(pool, far.endpoint(100 + 4 * round_ + i))
    for i in range(1000, 1500):
        use(pool, far.endpoint(i))
    assert hot <= open_endpoints(pool)


def test_nine_tenths_to_hot_endpoints_one_tenth_over_many(make_pool: MakePool, far: Far) -> None:
    """Once each hot one has had the time to come back, its channel is always there: at least 99 of 100 times."""
    pool = make_pool(max_sockets=128)
    rng = random.Random(7)
    hot = [far.endpoint(i) for i in range(50)]
    hits = tries = 0
    for n in range(6000):
        if rng.random() < 0.9:
            endpoint = rng.choice(hot)
            channel = pool.acquire_open(endpoint)
            tries += n >= 1000
            hits += n >= 1000 and channel is not None
            pool.release(channel or pool.acquire(endpoint))
        else:
            use(pool, far.endpoint(rng.randrange(100, 10_100)))
    assert hits / tries >= 0.99
    adds_up(pool.stats())


def ttl(pool: ChannelPool, endpoint: str) -> float:
    return next(row["ttl"] for row in pool.snapshot() if row["endpoint"] == endpoint)


def test_ttl_is_learnt_and_forgotten(make_pool: MakePool, far: Far, clock: Clock) -> None:
    pool = make_pool(max_sockets=8, idle_ttl=100.0, max_lifetime=1e6, clock=clock, attended=False)
    endpoint = far.endpoint(0)
    use(pool, endpoint)
    once = ttl(pool, endpoint)
    assert 90.0 <= once <= 100.0
    for _ in range(3):
        use(pool, endpoint)
    assert ttl(pool, endpoint) == pytest.approx(3 * once), "used four times: three times as long"
    for _ in range(1_000_000):
        if ttl(pool, endpoint) == pytest.approx(8 * once):
            break
        use(pool, endpoint)
    assert ttl(pool, endpoint) == pytest.approx(8 * once)
    for _ in range(3000):
        use(pool, endpoint)
    assert ttl(pool, endpoint) == pytest.approx(8 * once), "the longest there is"
    longest = ttl(pool, endpoint)
    for _ in range(20):
        clock.now += 100.0
        use(pool, endpoint)
    assert ttl(pool, endpoint) < longest / 3, "with a use every idle_ttl it is no longer a hot one"


def test_idle_channels_expire_and_busy_ones_do_not(make_pool: MakePool, far: Far, clock: Clock) -> None:
    pool = make_pool(max_sockets=8, idle_ttl=100.0, max_lifetime=1e6, clock=clock, attended=False)
    idle, busy, pinned = (far.endpoint(i) for i in range(3))
    use(pool, idle)
    held = pool.acquire(busy)
    pool.release(pool.acquire(pinned, persistent=True))
    clock.now += 89.0
    pool.maintain()
    assert open_endpoints(pool) == {idle, busy, pinned}
    clock.now += 12.0
    pool.maintain()
    assert open_endpoints(pool) == {busy, pinned}
    pool.unpin(pinned)
    pool.maintain()
    pool.release(held)
    assert open_endpoints(pool) == {busy}
    assert pool.stats()["expired_idle"] == 2


def test_lifetime_ends_when_nobody_uses_it(make_pool: MakePool, far: Far, clock: Clock) -> None:
    pool = make_pool(max_sockets=8, idle_ttl=1e6, max_lifetime=1000.0, clock=clock, attended=False)
    old, never_idle = far.endpoint(0), far.endpoint(1)
    use(pool, old)
    held = pool.acquire(never_idle)
    clock.now += 1001.0
    pool.maintain()
    assert open_endpoints(pool) == {never_idle}
    assert call(held) == b"ok"
    pool.release(held)
    assert open_endpoints(pool) == set(), (
        "it is replaced when its last user has gone, without waiting for maintain()"
    )
    assert pool.stats()["expired_lifetime"] == 2
    use(pool, never_idle)


def test_channels_of_one_age_do_not_expire_together(make_pool: MakePool, far: Far, clock: Clock) -> None:
    pool = make_pool(max_sockets=64, idle_ttl=100.0, clock=clock, attended=False)
    for i in range(64):
        use(pool, far.endpoint(i))
    left = []
    for _ in range(11):
        pool.maintain()
        left.append(len(open_endpoints(pool)))
        clock.now += 1.0 if left[0] != left[-1] or len(left) > 1 else 90.0
    assert left[0] == 64
    assert left[-1] < 20
    assert len(set(left)) > 5, left


def test_expiry_goes_on_without_traffic(make_pool: MakePool, far: Far) -> None:
    """By the one maintenance thread, and it has nothing left to do afterwards."""
    pool = make_pool(max_sockets=8, idle_ttl=0.05)
    for i in range(4):
        use(pool, far.endpoint(i))
    until(lambda: pool.stats()["open"] == 0, "expiry")
    assert pool.stats()["expired_idle"] == 4
    use(pool, far.endpoint(0))
    until(lambda: pool.stats()["open"] == 0, "expiry after the pool was empty")


@pytest.fixture
def pinned_pool(make_pool: MakePool, far: Far) -> Iterator[ChannelPool]:
    pool = make_pool(max_sockets=4, max_sockets_per_endpoint=2)
    for i in range(2):
        pool.pin(far.endpoint(i))
    return pool


def test_pins_cannot_take_more_than_there_is(pinned_pool: ChannelPool, far: Far) -> None:
    pinned_pool.pin(far.endpoint(0))
    with pytest.raises(
        TimeoutError, match=r"2 endpoints are pinned already, and the pool has 4 sockets, up to 2 for"
    ):
        pinned_pool.pin(far.endpoint(2))


def test_several_sockets_to_one_endpoint_spread_its_users(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=4, max_sockets_per_endpoint=3)
    held = [pool.acquire(far.endpoint(0)) for _ in range(9)]
    assert len(set(held)) == 3
    assert sorted(row["users"] for row in pool.snapshot()) == [3, 3, 3]
    for channel in held:
        pool.release(channel)
    adds_up(pool.stats())


def call_once(pool: ChannelPool, endpoint: str) -> None:
    pool.call(endpoint, b"t", "m", b"", None, b"", 1, 30.0)


def cast_now(pool: ChannelPool, endpoint: str) -> int:
    return pool.send_now(endpoint, "cast", b"t", "m", b"", None, b"", 1)


def test_a_cast_at_once_counts_as_a_use(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=4)
    a, b, c, d, e, f = (far.endpoint(i) for i in range(6))
    assert cast_now(pool, a) == 0
    assert pool.stats()["acquired"] == pool.stats()["open"] == 0
    for endpoint in (a, b, c, d):
        call_once(pool, endpoint)
    assert cast_now(pool, a) > 0
    stats = pool.stats()
    assert (stats["acquired"], stats["reused"], stats["in_use"]) == (5, 1, 0)
    (row,) = (row for row in pool.snapshot() if row["endpoint"] == a)
    assert row["casts"] == 1
    until(lambda: all(channel.settle() for channel in pool.channels()), "the acknowledgement")
    use(pool, e)
    assert open_endpoints(pool) == {a, c, d, e}
    use(pool, f)
    assert open_endpoints(pool) == {a, d, e, f}
    adds_up(pool.stats())


def test_casts_at_once_protect_from_a_scan(make_pool: MakePool, far: Far) -> None:
    pool = make_pool(max_sockets=10)
    hot, *cold = (far.endpoint(i) for i in range(60))
    call_once(pool, hot)
    for endpoint in cold[:6]:
        call_once(pool, endpoint)
    assert cast_now(pool, hot) > 0  # used again, six openings later
    for endpoint in cold[6:]:
        use(pool, endpoint)
    assert hot in open_endpoints(pool)
