"""Many threads on one channel: each gets the answer to its own request, and nobody is forgotten."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore._channel import Channel

#: A lost wake-up shows as DeadlineExceeded: nothing else here takes that long.
TIMEOUT = 20.0


def call(channel: Channel, method: str, body: bytes, timeout: float | None = TIMEOUT) -> bytes:
    return bytes(channel.call(b"t", method, body, None, b"", 1, timeout).body)


def hammer(channel: Channel, team: Any, threads: int, calls: int, limit: float) -> list[int]:
    """Let ``threads`` threads make ``calls`` calls in all; return how many each of them made."""
    tickets = itertools.count()
    made = [0] * threads

    def work(mine: int) -> None:
        while (ticket := next(tickets)) < calls:
            body = b"%d %d" % (mine, ticket)
            assert call(channel, "echo", body) == body
            made[mine] += 1

    for mine in range(threads):
        team.start(work, mine)
    team.join(limit)
    return made


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("spin", [60e-6, 0.0])
def test_each_thread_gets_its_own_answers(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, threads: int, spin: float
) -> None:
    channel = connect(start_server(port={"spin": spin}).endpoint, spin=spin)
    made = hammer(channel, team, threads, 4000, 120.0)
    assert sum(made) == 4000
    stats = channel.stats()
    assert (stats["calls"], stats["replies"]) == (4000, 4000)
    assert (stats["late_replies"], stats["garbage"], stats["timeouts"], stats["lost"]) == (0, 0, 0, 0)
    assert channel.clean
    assert not channel.led


@pytest.mark.usefixtures("quick_switches")
def test_switching_threads_all_the_time_loses_nobody(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(start_server().endpoint, spin=0.0)
    assert sum(hammer(channel, team, 16, 4000, 120.0)) == 4000
    assert channel.clean


@pytest.mark.usefixtures("quick_switches")
def test_calls_and_casts_of_many_threads_mix(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(start_server().endpoint, window_messages=300)

    def cast(mine: int) -> None:
        for number in range(1500):
            channel.send("cast", b"t", "count", b"%d %d" % (mine, number), None, b"", 1, TIMEOUT)

    def ask(mine: int) -> None:
        for number in range(500):
            body = b"%d %d" % (mine, number)
            assert call(channel, "echo", body) == body

    for mine in range(4):
        team.start(cast, mine)
        team.start(ask, mine)
    team.join(120.0)
    report = json.loads(call(channel, "report", b""))
    assert (report["casts"], report["disorder"]) == (6000, 0)


def test_threads_share_the_channel_roughly_alike(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)
    made = [0] * 8
    over = threading.Event()

    def work(mine: int) -> None:
        while not over.is_set():
            call(channel, "echo", b"")
            made[mine] += 1

    for mine in range(8):
        team.start(work, mine)
    until(lambda: sum(made) >= 8000, "many calls")
    over.set()
    team.join()
    # Without fairness a few threads would take it all; measured, the extremes differ by a few percent.
    assert min(made) * 3 > max(made), made


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_calls_lose_no_wake_up(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(start_server().endpoint)
    started = time.monotonic()
    made = hammer(channel, team, 8, 10**6, 1500.0)
    taken = time.monotonic() - started
    print(
        f"\n10**6 calls of 8 threads in {taken:.1f} s: {1e6 / taken:,.0f} calls/s; per thread {sorted(made)}"
    )
    stats = channel.stats()
    assert (stats["replies"], stats["timeouts"], stats["late_replies"], stats["lost"]) == (10**6, 0, 0, 0)
