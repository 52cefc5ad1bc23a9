"""Endpoints that are dead: refused, silent, black holes; and channels that have died without a word."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from clock_support import Clock
from pool_support import PATIENCE, Far, adds_up, call, cast
from waiting_support import until

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore.endpoint import Refusal
from zmqcore.errors import DeadlineExceeded, InvalidEndpoint, PeerLost, PoolExhausted, Unreachable

MakePool = Callable[..., ChannelPool]


@pytest.fixture
def refused() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """It accepts connections, and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A full backlog: connect(2) is not answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        callers = [socket.socket() for _ in range(8)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(address)
        yield f"tcp://127.0.0.1:{address[1]}"
        for caller in callers:
            caller.close()


def test_refused(make_pool: MakePool, refused: str) -> None:
    pool = make_pool(max_sockets=2, connect_timeout=PATIENCE)
    started = time.monotonic()
    with pytest.raises(
        Unreachable, match=rf"{refused}: connection refused \(tried for [\d.e-]+ s; 1 attempt in"
    ):
        pool.acquire(refused)
    assert time.monotonic() - started < PATIENCE, "said at once, not after connect_timeout"
    stats = pool.stats()
    assert (stats["unreachable"], stats["dead"], stats["unreachable_known"]) == (1, 1, 1)
    assert stats["idle"] == stats["in_use"] == stats["connecting"] == 0
    adds_up(stats)


def test_refused_and_remembered_with_backoff(make_pool: MakePool, refused: str) -> None:
    now = [100.0]
    pool = make_pool(max_sockets=2, clock=lambda: now[0], attended=False)
    pauses = []
    for attempt in range(1, 9):
        with pytest.raises(Unreachable, match=f"tried for .*; {attempt} attempt"):
            pool.acquire(refused)
        start = now[0]
        while True:
            hits = pool.stats()["negative_hits"]
            opened = pool.stats()["opened"]
            with pytest.raises(Unreachable) as raised:
                pool.acquire(refused)
            if pool.stats()["opened"] > opened:
                # That was the next attempt: forget it, so that the loop above counts right.
                pytest.fail("tried again before its time")
            assert pool.stats()["negative_hits"] == hits + 1
            left = float(str(raised.value).partition("tried again in ")[2].split()[0])
            now[0] += left * 1.06  # two digits are said
            break
        pauses.append(now[0] - start)
    assert all(0.5 * 0.02 * 2**n * 0.9 <= pause <= 0.02 * 2**n * 1.2 for n, pause in enumerate(pauses[:6])), (
        pauses
    )
    assert 0.4 <= pauses[-1] <= 1.2, "a second at most"
    assert len(set(pauses)) == len(pauses), "with jitter"


def test_back_again(make_pool: MakePool, refused: str, context: zmq.Context[Any]) -> None:
    pool = make_pool(max_sockets=2)
    with pytest.raises(Unreachable):
        pool.acquire(refused)
    far = Far(context, refused)
    got: list[Channel] = []

    def reached() -> bool:
        try:
            got.append(pool.acquire(refused))
        except Unreachable:
            return False
        return True

    until(reached)
    assert call(got[0]) == b"ok"
    assert pool.stats()["unreachable_known"] == 0
    pool.release(got[0])
    far.close()


def test_many_callers_count_one_attempt(make_pool: MakePool, refused: str) -> None:
    pool = make_pool(max_sockets=2)
    texts: list[str] = []

    def work() -> None:
        with pytest.raises(Unreachable) as raised:
            pool.acquire(refused)
        texts.append(str(raised.value))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 16
    assert pool.stats()["opened"] <= 3, (
        "those that came together shared one attempt, the later ones its outcome"
    )


def test_accepts_but_says_nothing(make_pool: MakePool, silent: str) -> None:
    """It may be stopped, want keys, or be no ZeroMQ at all: what is not known is not said."""
    pool = make_pool(max_sockets=2, connect_timeout=0.1)
    with pytest.raises(Unreachable, match="it accepts connections, but no handshake of ZeroMQ's came about"):
        pool.acquire(silent)


def test_wants_keys(make_pool: MakePool, context: zmq.Context[Any], clock: Clock) -> None:
    """The first attempt takes its time; one that had less of it tells what is known, and all that was tried."""
    pool = make_pool(max_sockets=2, connect_timeout=0.2, clock=clock, attended=False)
    with context.socket(zmq.ROUTER) as router:
        _, router.curve_secretkey = zmq.curve_keypair()
        router.curve_server = True
        endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
        with pytest.raises(Unreachable, match=r"no handshake .* \(tried for 0\.\d+ s; 1 attempt in "):
            pool.acquire(endpoint)
        clock.now += 2.0
        with pytest.raises(Unreachable, match=r"no handshake .* \(tried for .*; 2 attempts in 2 s\)"):
            pool.acquire(endpoint, 0.0)


def test_a_black_hole(make_pool: MakePool, black_hole: str) -> None:
    pool = make_pool(max_sockets=2, connect_timeout=0.1)
    with pytest.raises(Unreachable, match="timed out"):
        pool.acquire(black_hole)


def test_a_short_deadline_is_no_failure_of_the_endpoint(make_pool: MakePool, silent: str) -> None:
    pool = make_pool(max_sockets=2, connect_timeout=PATIENCE)
    for timeout in (0.0, 0.01):
        with pytest.raises(
            Unreachable, match=r"no connection within the .* that were left \(connect_timeout is 30 s"
        ):
            pool.acquire(silent, timeout)
    stats = pool.stats()
    assert (stats["unreachable_known"], stats["negative_hits"], stats["unreachable"]) == (0, 0, 0)
    assert stats["abandoned"] == 2


def test_what_short_attempts_could_not_tell_adds_up(
    make_pool: MakePool, silent: str, far: Far, clock: Clock
) -> None:
    """Together they have waited for as long as anybody would: the next one is refused at once."""
    pool = make_pool(max_sockets=1, connect_timeout=0.5, clock=clock, attended=False)
    attempts = 0
    while not pool.stats()["unreachable_known"]:
        attempts += 1
        assert attempts < 100
        with pytest.raises(Unreachable) as raised:
            pool.acquire(silent, 0.1)
    assert attempts > 1
    text = str(raised.value)
    assert re.search(rf"no handshake of ZeroMQ's came about \(tried for .*; {attempts} attempts in", text)
    with pytest.raises(Unreachable, match="known from before"):
        pool.acquire(silent, 0.1)
    # As long as nothing has come of it, each further one counts by itself.
    clock.now += 2.0
    with pytest.raises(Unreachable, match=f"{attempts + 1} attempts in"):
        pool.acquire(silent, 0.01)
    with pytest.raises(Unreachable, match="known from before"):
        pool.acquire(silent, 0.01)
    assert call(pool.acquire(far.endpoint(0))) == b"ok"
    adds_up(pool.stats())


def test_who_has_more_time_goes_on(
    make_pool: MakePool, refused: str, context: zmq.Context[Any], clock: Clock
) -> None:
    """That others have spent theirs does not end an attempt that goes on."""
    pool = make_pool(max_sockets=1, connect_timeout=3.0, clock=clock, attended=False, probe=None)
    while not pool.stats()["unreachable_known"]:
        with pytest.raises(Unreachable):
            pool.acquire(refused, 1.0)
    clock.now += 2.0
    got: list[Channel] = []
    patient = threading.Thread(target=lambda: got.append(pool.acquire(refused)))
    patient.start()
    until(lambda: pool.stats()["connecting"] == 1)
    before = pool.stats()["unreachable"]
    with pytest.raises(Unreachable):
        pool.acquire(refused, 0.0)
    assert pool.stats()["unreachable"] == before + 1, "it counts as a failure"
    assert patient.is_alive()
    far = Far(context, refused)
    patient.join()
    assert call(got[0]) == b"ok"
    assert pool.stats()["unreachable_known"] == 0
    pool.release(got[0])
    far.close()


def test_a_lack_of_ours_is_no_failure_of_the_endpoint(make_pool: MakePool, silent: str) -> None:
    lack = Refusal("it cannot be asked from here: too many open files", final=False, local=True)
    pool = make_pool(max_sockets=2, connect_timeout=0.1, probe=lambda _endpoint, _timeout: lack)
    for timeout in (PATIENCE, 0.05):
        with pytest.raises(PoolExhausted, match=r"from here: too many open files.* not the endpoint's fault"):
            pool.acquire(silent, timeout)
    stats = pool.stats()
    assert (stats["unreachable"], stats["unreachable_known"]) == (0, 0)
    adds_up(stats)


def test_live_endpoints_at_the_limit_of_descriptors(make_pool: MakePool, far: Far) -> None:
    """Whatever of it fails first, nobody says that the endpoint is dead."""
    pool = make_pool(max_sockets=8, connect_timeout=0.1)
    pool.release(pool.acquire(far.endpoint(0)))
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for n in range(1, 5):
            os.close(taken.pop())
            with contextlib.suppress(PoolExhausted):
                pool.release(pool.acquire(far.endpoint(n)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    assert pool.stats()["unreachable"] == 0


def test_dead_endpoints_hold_no_budget(make_pool: MakePool, far: Far, refused: str) -> None:
    """A hundred dead ones through two sockets, with live ones in between: each is told what it is."""
    pool = make_pool(max_sockets=2)
    number = refused.rpartition(":")[2]
    reached, dead = 0, 0
    for i in range(100):
        with pytest.raises(Unreachable):
            pool.acquire(f"tcp://127.0.9.{i + 1}:{number}")
        dead += 1
        channel = pool.acquire(far.endpoint(i % 5))
        reached += call(channel) == b"ok"
        pool.release(channel)
    stats = pool.stats()
    assert (reached, dead, stats["unreachable"], stats["unreachable_known"]) == (100, 100, 100, 100)
    adds_up(stats)


def test_not_an_endpoint(make_pool: MakePool) -> None:
    pool = make_pool(max_sockets=2)
    for text in ("nonsense", "tcp://", "tcp://127.0.0.1", "carrier://pigeon"):
        with pytest.raises((InvalidEndpoint, Unreachable)):
            pool.acquire(text, 0.05)
    stats = pool.stats()
    assert (stats["in_use"], stats["connecting"]) == (0, 0)


# -- channels that die ----------------------------------------------------------------------------------------


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
