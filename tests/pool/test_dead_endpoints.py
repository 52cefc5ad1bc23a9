"""Endpoints that cannot be reached, do not speak, or have gone: they cost little and are tried again."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from clock_support import Clock
from pool_support import PATIENCE, Far, adds_up, call, cast
from waiting_support import until

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore.errors import DeadlineExceeded, PeerLost, Unreachable, ZmqcoreError

MakePool = Callable[..., ChannelPool]

_FIRST_PAUSE = 0.02
"""The backoff after a first failure, in seconds; half of that at least."""


@pytest.fixture
def free_port() -> int:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def dead(free_port: int) -> str:
    return f"tcp://127.0.0.1:{free_port}"


@pytest.fixture
def mute() -> Iterator[str]:
    """The kernel accepts connections, and nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def _fill(stack: contextlib.ExitStack, family: int, address: Any) -> None:
    """Connect to a listener that accepts nobody until its backlog takes no more."""
    for _ in range(64):
        filler = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        filler.settimeout(0.2)
        try:
            filler.connect(address)
        except (TimeoutError, BlockingIOError):
            return
    pytest.skip("the backlog cannot be filled here")


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A connection to it is neither made nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        _fill(stack, socket.AF_INET, listener.getsockname())
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def local_black_hole() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = str(Path(directory, "full"))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        _fill(stack, socket.AF_UNIX, path)
        yield f"ipc://{path}"


def fails(pool: ChannelPool, endpoint: str, timeout: float = PATIENCE) -> str:
    """Acquire what cannot be reached, and return what the error says."""
    with pytest.raises(Unreachable) as caught:
        pool.acquire(endpoint, timeout)
    return str(caught.value)


def works(pool: ChannelPool, endpoint: str) -> None:
    channel = pool.acquire(endpoint, PATIENCE)
    try:
        assert call(channel) == b"ok"
    finally:
        pool.release(channel)


def seconds(pattern: str, text: str) -> float:
    found = re.search(pattern.replace("*", r"([0-9.e+-]+)"), text)
    assert found, text
    return float(found[1])


# -- what the error says ---------------------------------------------------------------------------------------


def test_no_such_file(make_pool: MakePool, tmp_path: Path) -> None:
    endpoint = "ipc:///nowhere/" + tmp_path.name
    assert fails(make_pool(), endpoint).startswith(f"{endpoint}: no such file or directory (tried for ")


def test_a_black_hole_of_this_host(make_pool: MakePool, local_black_hole: str) -> None:
    pool = make_pool(connect_timeout=0.1)
    text = fails(pool, local_black_hole)
    assert text.startswith(f"{local_black_hole}: its backlog is full")
    assert seconds("tried for * s", text) >= 0.1


def test_too_little_time_to_tell_is_no_failure(make_pool: MakePool, black_hole: str, far: Far) -> None:
    """The next one may have more time. Nor does it keep the only place."""
    pool = make_pool(max_sockets=1, connect_timeout=30.0)
    text = fails(pool, black_hole, 0.05)
    assert text.startswith(f"{black_hole}: no connection within the ")
    assert "connect_timeout is 30 s" in text
    assert seconds(r"within the * s", text) >= 0.05
    stats = pool.stats()
    assert (stats["unreachable"], stats["unreachable_known"]) == (0, 0)
    works(pool, far.endpoint(0))


# -- backoff ---------------------------------------------------------------------------------------------------


def test_the_pauses_vary(make_pool: MakePool, clock: Clock) -> None:
    pool = make_pool(attended=False, clock=clock)
    pauses = set()
    with contextlib.ExitStack() as stack:
        ports = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(20)
        ]
    for port in ports:
        fails(pool, f"tcp://127.0.0.1:{port}")
        pause = seconds("again in * s", fails(pool, f"tcp://127.0.0.1:{port}"))
        assert _FIRST_PAUSE / 2 <= pause <= _FIRST_PAUSE
        pauses.add(pause)
    assert len(pauses) > 3


def test_a_failure_is_forgotten_in_time(make_pool: MakePool, clock: Clock, dead: str, far: Far) -> None:
    pool = make_pool(attended=False, clock=clock)
    works(pool, far.endpoint(0))
    fails(pool, dead)
    clock.now += 59.0
    pool.maintain()
    assert pool.stats()["unreachable_known"] == 1
    clock.now += 2.0
    pool.maintain()
    assert pool.stats()["unreachable_known"] == 0
    assert "1 attempt in " in fails(pool, dead)


def test_a_failure_is_forgotten_although_nobody_maintains_the_pool(
    make_pool: MakePool, clock: Clock, dead: str
) -> None:
    """An empty pool needs no maintenance."""
    pool = make_pool(attended=False, clock=clock)
    for _ in range(3):
        fails(pool, dead)
        clock.now += 2.0
    until(lambda: pool.maintain() is None, "the pool's emptiness")
    clock.now += 3600.0
    assert "1 attempt in 0 s" in fails(pool, dead)
    pause = seconds("again in * s", fails(pool, dead))
    assert pause <= _FIRST_PAUSE
    clock.now += 3600.0
    assert pool.stats()["unreachable_known"] == 0


def test_those_who_try_together_count_as_one_attempt(make_pool: MakePool, clock: Clock, mute: str) -> None:
    pool = make_pool(attended=False, clock=clock, connect_timeout=0.5)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(fails(pool, mute))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert all("1 attempt in " in text for text in texts)
    stats = pool.stats()
    assert stats["opened"] == 1
    assert 1 <= stats["unreachable"] <= 8 - stats["negative_hits"]
    adds_up(stats)


# -- the budget ------------------------------------------------------------------------------------------------


def test_the_only_place_is_free_again(make_pool: MakePool, dead: str, far: Far) -> None:
    pool = make_pool(max_sockets=1)
    for i in range(20):
        fails(pool, dead)
        works(pool, far.endpoint(i))
    adds_up(pool.stats())


def test_what_is_known_to_be_dead_needs_no_place(
    make_pool: MakePool, clock: Clock, dead: str, far: Far
) -> None:
    """Neither does it wait for one, nor does it evict anybody."""
    pool = make_pool(attended=False, clock=clock, max_sockets=1)
    fails(pool, dead)
    held = pool.acquire(far.endpoint(0))
    before = pool.stats()
    assert "known from before" in fails(pool, dead)
    pool.release(held)
    assert "known from before" in fails(pool, dead)
    stats = pool.stats()
    assert stats["negative_hits"] == before["negative_hits"] + 2
    same = ("waits", "opened", "evicted_clean", "evicted_draining")
    assert [stats[name] for name in same] == [before[name] for name in same]
    assert stats["idle"] == 1
    assert pool.acquire_open(far.endpoint(0)) is held
    pool.release(held)


def test_live_ones_among_dead_ones(make_pool: MakePool, dead: str, mute: str, far: Far) -> None:
    pool = make_pool(max_sockets=2, connect_timeout=0.05)
    errors: list[BaseException] = []
    unreachable: list[str] = []

    def work(first: int) -> None:
        try:
            for i in range(20):
                works(pool, far.endpoint(first + i))
                unreachable.append(fails(pool, (dead, mute)[i % 2]))
        except BaseException as exc:  # noqa: BLE001 (looked at by the test)
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    stats = pool.stats()
    assert len(unreachable) == 120
    assert stats["acquired"] == 120
    # Those who were waiting for the same attempt are not counted one by one.
    assert 2 <= stats["unreachable"] <= 120 - stats["negative_hits"]
    until(lambda: pool.stats()["connecting"] == 0)
    adds_up(pool.stats())


# -- peers that were alive -------------------------------------------------------------------------------------

_FAR = """
import sys, zmq
from pool_support import Far
far = Far(zmq.Context(), sys.argv[1])
print(far.port.endpoints[0], flush=True)
sys.stdin.read()
"""


class Process:
    """A Far in a process of its own."""

    def __init__(self, bind: str = "tcp://127.0.0.1:*") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _FAR, bind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()

    def kill(self) -> None:
        with self.process:
            self.process.kill()


def test_a_peer_that_was_killed(make_pool: MakePool) -> None:
    pool = make_pool(idle_ttl=1.0)
    peer = Process()
    try:
        works(pool, peer.endpoint)
        peer.kill()
        until(lambda: pool.stats()["lost"] == 1, "noticing the loss without traffic")
        assert "connection refused" in fails(pool, peer.endpoint)
        peer = Process(peer.endpoint)
        assert peer.endpoint

        def works_again() -> bool:
            try:
                works(pool, peer.endpoint)
            except Unreachable:
                return False
            return True

        until(works_again, "coming back")
        adds_up(pool.stats())
    finally:
        peer.kill()


def test_a_peer_that_was_killed_under_a_call(make_pool: MakePool, context: zmq.Context[Any]) -> None:
    pool = make_pool(idle_ttl=1.0)
    peer = Process()
    channel = pool.acquire(peer.endpoint)
    try:
        assert call(channel) == b"ok"
        peer.kill()
        with pytest.raises(ZmqcoreError):
            call(channel)
    finally:
        peer.kill()
        pool.release(channel)
    far = Far(context, peer.endpoint)
    try:
        until(lambda: _replaced(pool, peer.endpoint, channel), "replacing the lost channel")
        works(pool, peer.endpoint)
    finally:
        far.close()


def _replaced(pool: ChannelPool, endpoint: str, lost: Channel) -> bool:
    try:
        channel = pool.acquire(endpoint)
    except ZmqcoreError:
        return False
    pool.release(channel)
    return channel is not lost


@pytest.fixture
def silent(context: zmq.Context[Any]) -> Iterator[str]:
    """A ROUTER that nobody reads from: connections are made, and nothing is ever acknowledged."""
    with context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind("tcp://127.0.0.1:*")
        yield router.get_string(zmq.LAST_ENDPOINT)


def test_a_peer_that_never_answers_is_busy(make_pool: MakePool, silent: str) -> None:
    """Its I/O thread answers heartbeats, so it is there. Nobody takes a connection away from it for being slow."""
    pool = make_pool(attended=False, idle_ttl=1e6)
    channel = pool.acquire(silent)
    cast(channel, b"x")
    with pytest.raises(DeadlineExceeded):
        call(channel, 0.05)
    pool.release(channel)
    for _ in range(100):
        pool.maintain()
    assert pool.acquire(silent) is channel
    pool.release(channel)
    assert pool.stats()["lost"] == 0


def test_where_a_server_has_said_goodbye_one_asks_first(make_pool: MakePool, far: Far) -> None:
    """What is sent on a connection that a server may be closing right now: nobody could tell what has become of it."""
    pool = make_pool()
    where = far.endpoint(0)
    channel = pool.acquire(where)
    call(channel)
    pool.release(channel)
    far.port.goodbye()
    until(lambda: channel.look() or not channel.usable, "the goodbye")
    for _ in range(3):
        with pytest.raises(PeerLost, match="takes nothing new") as raised:
            pool.acquire(where)
        assert not raised.value.executed_possible
    assert pool.stats()["goodbyes"] == 4
