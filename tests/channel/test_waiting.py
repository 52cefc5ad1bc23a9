"""Deadlines, and what becomes of those who wait when the leader leaves."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waiting_support import waiting_threads

from zmqcore import errors
from zmqcore._channel import Channel

LONG = 20.0


def call(channel: Channel, method: str, body: bytes = b"", timeout: float | None = LONG) -> bytes:
    return bytes(channel.call(b"t", method, body, None, b"", 1, timeout).body)


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """``alarm(seconds)`` raises KeyboardInterrupt in the main thread, as Ctrl-C does."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)


def test_without_a_server_a_call_ends_as_unreachable(nowhere: Any, connect: Callable[..., Channel]) -> None:
    channel = connect(nowhere.endpoint, open=False)
    assert not channel.wait_open(0.05)
    with pytest.raises(errors.Unreachable, match="no connection within"):
        call(channel, "echo", timeout=0.1)
    with pytest.raises(errors.Unreachable):
        channel.send("cast", b"t", "m", b"", None, b"", 1, 0.0)
    assert channel.state_name == "connecting"
    assert channel.clean


def test_a_stopped_server_ends_the_call_by_its_deadline(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    server = start_server()
    channel = connect(server.endpoint)
    assert call(channel, "echo", b"1") == b"1"
    server.pause()
    with pytest.raises(errors.DeadlineExceeded, match=r"not answered within 0\.2 s"):
        call(channel, "echo", b"2", timeout=0.2)
    assert channel.stats()["timeouts"] == 1
    server.resume()
    # The answer to the second call comes now, too late: it is dropped and counted, the third call gets its own.
    assert call(channel, "echo", b"3") == b"3"
    assert channel.stats()["late_replies"] == 1


def test_late_replies_are_dropped_and_counted(
    start_server: Callable[..., Any], connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)
    for _ in range(5):
        with pytest.raises(errors.DeadlineExceeded):
            call(channel, "after", b"150", timeout=0.02)
    until(lambda: channel.ping(LONG) and channel.stats()["late_replies"] == 5, "five late replies")
    assert channel.stats()["outstanding_calls"] == 0
    assert call(channel, "echo", b"mine") == b"mine"


def test_no_timeout_means_for_ever(start_server: Callable[..., Any], connect: Callable[..., Channel]) -> None:
    channel = connect(start_server().endpoint)
    assert call(channel, "after", b"300", timeout=None) == b"after"


@pytest.mark.parametrize("timeout", [0, 0.0, -1.0])
def test_a_timeout_of_nothing_ends_at_once(
    start_server: Callable[..., Any], connect: Callable[..., Channel], timeout: float
) -> None:
    channel = connect(start_server().endpoint)
    with pytest.raises(errors.DeadlineExceeded):
        call(channel, "silent", timeout=timeout)
    assert call(channel, "echo", b"after that") == b"after that"


def test_a_timeout_that_is_no_number_is_refused(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint)
    with pytest.raises(ValueError, match="not a number"):
        call(channel, "echo", timeout=float("nan"))
    with pytest.raises(TypeError):
        channel.call(b"t", "echo", b"", None, b"", 1, "soon")  # type: ignore[arg-type]
    assert channel.clean


def test_ping_is_answered_while_the_server_is_alive(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    server = start_server()
    channel = connect(server.endpoint)
    assert 0 < channel.ping(LONG) < LONG
    server.pause()
    with pytest.raises(errors.DeadlineExceeded):
        channel.ping(0.1)


def test_when_the_leaders_time_is_over_a_follower_leads(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)

    def lead() -> None:
        with pytest.raises(errors.DeadlineExceeded):
            call(channel, "silent", timeout=0.3)

    def follow(ms: int) -> None:
        assert call(channel, "after", b"%d" % ms) == b"after"

    team.start(lead)
    until(lambda: channel.led, "a leader")
    for ms in (600, 700, 800, 500):
        team.start(follow, ms)
    team.join()
    assert not channel.led


def test_when_the_leader_is_interrupted_a_follower_leads(
    start_server: Callable[..., Any],
    connect: Callable[..., Channel],
    team: Any,
    alarm: Callable[[float], None],
    until: Callable[..., None],
) -> None:
    channel = connect(start_server().endpoint)

    def follow() -> None:
        until(lambda: channel.led, "a leader")
        assert call(channel, "after", b"700") == b"after"

    def interrupt() -> None:
        until(lambda: waiting_threads() == 3, "a leader and two followers")
        alarm(1e-6)

    for work in (follow, follow, interrupt):
        team.start(work)
    with pytest.raises(KeyboardInterrupt):
        call(channel, "silent", timeout=LONG)
    team.join()
    assert channel.stats()["outstanding_calls"] == 0
    assert call(channel, "echo", b"goes on") == b"goes on"


def test_an_interrupted_follower_leaves_the_others_alone(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, alarm: Callable[[float], None],
    until: Callable[..., None],
) -> None:  # fmt: skip
    channel = connect(start_server().endpoint)

    def lead() -> None:
        assert call(channel, "after", b"900") == b"after"

    def interrupt() -> None:
        until(lambda: waiting_threads() == 2, "a leader and a follower")
        alarm(1e-6)

    team.start(lead)
    until(lambda: channel.led, "a leader")
    team.start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call(channel, "silent", timeout=None)
    assert channel.led
    team.join()


@pytest.mark.parametrize("spin", [0.0, 60e-6, 0.002])
def test_an_interrupt_is_not_missed_at_any_moment(
    start_server: Callable[..., Any],
    connect: Callable[..., Channel],
    alarm: Callable[[float], None],
    spin: float,
) -> None:
    """The signal comes before the wait, while it spins, as it blocks: it must end the call, not the deadline."""
    channel = connect(start_server().endpoint, spin=spin)
    call(channel, "echo")
    missed = []

    def call_alarmed(delay: float) -> None:
        try:
            alarm(delay)
            call(channel, "silent", timeout=LONG)
        except errors.DeadlineExceeded:
            time.sleep(0.1)  # the interrupt comes only now

    for round_ in range(150):
        delay = 1e-4 + round_ * 2e-5 if spin > 0.001 else 5e-6 + round_ * 4e-6
        with pytest.raises(KeyboardInterrupt) as caught:
            call_alarmed(delay)
        if isinstance(caught.value.__context__, errors.DeadlineExceeded):
            missed.append(round_)
    assert missed == []


def test_waiting_for_the_connection_may_be_interrupted(
    nowhere: Any, connect: Callable[..., Channel], team: Any,
    alarm: Callable[[float], None], start_server: Callable[..., Any], until: Callable[..., None],
) -> None:  # fmt: skip
    channel = connect(nowhere.endpoint, open=False)

    def wait() -> None:
        assert channel.wait_open(LONG)

    def interrupt() -> None:
        until(lambda: waiting_threads() == 4, "all wait")
        alarm(1e-6)

    for work in (wait, wait, wait, interrupt):
        team.start(work)
    with pytest.raises(KeyboardInterrupt):
        channel.wait_open(LONG)
    start_server(endpoints=[nowhere.free()])
    team.join()


def test_a_connection_wakes_everybody_who_waits_for_it(
    nowhere: Any, connect: Callable[..., Channel], team: Any,
    start_server: Callable[..., Any], until: Callable[..., None],
) -> None:  # fmt: skip
    channel = connect(nowhere.endpoint, open=False)

    def wait() -> None:
        assert channel.wait_open(LONG)

    def ask(number: int) -> None:
        assert call(channel, "echo", b"%d" % number) == b"%d" % number

    for number in range(4):
        team.start(wait)
        team.start(ask, number)
    until(lambda: waiting_threads() == 8, "all wait")
    start_server(endpoints=[nowhere.free()])
    team.join()
