"""Requests nobody waits for: callbacks, the attendant, cancelling."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waiting_support import stands_in, waiting_threads

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._pending import Pending
from zmqcore.attendant import Attendant

LONG = 20.0


def submit(
    channel: Channel,
    method: str,
    body: bytes = b"",
    timeout: float | None = LONG,
    callback: Callable[[Pending], object] = repr,
) -> Pending:
    return channel.submit(b"t", method, body, None, b"", 1, timeout, callback)


def call(channel: Channel, method: str, body: bytes = b"", timeout: float | None = LONG) -> bytes:
    return bytes(channel.call(b"t", method, body, None, b"", 1, timeout).body)


@pytest.fixture
def attendant() -> Iterator[Attendant]:
    made = Attendant()
    yield made
    made.close()


@pytest.fixture
def attended(
    attendant: Attendant, start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> tuple[Channel, Any]:
    """A channel that an attendant looks after, and its server."""
    server = start_server()
    return connect(server.endpoint, attention=attendant.attend), server


class Collector:
    """A callback that remembers, and can be waited for."""

    def __init__(self, expected: int = 1) -> None:
        self.ended: list[Pending] = []
        self._expected = expected
        self._all = threading.Event()

    def __call__(self, pending: Pending) -> None:
        self.ended.append(pending)
        if len(self.ended) == self._expected:
            self._all.set()

    def wait(self) -> None:
        assert self._all.wait(LONG), f"{len(self.ended)} of {self._expected} callbacks"


def test_who_waits_drives_the_channel(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint)
    collector = Collector()
    pending = submit(channel, "after", b"50", callback=collector)
    assert not pending.done
    assert "waiting" in repr(pending)
    assert bytes(pending.envelope().body) == b"after"
    assert collector.ended == [pending]
    assert pending.done
    assert pending.wait(0.0)
    assert not pending.cancel()


def test_waiting_may_give_up_and_be_taken_up_again(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint)
    pending = submit(channel, "after", b"300")
    assert not pending.wait(0.02)
    assert not pending.wait(0.0)
    assert bytes(pending.envelope().body) == b"after"


def test_without_an_attendant_the_waiter_keeps_the_deadline(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint)
    collector = Collector()
    pending = submit(channel, "silent", timeout=0.1, callback=collector)
    with pytest.raises(errors.DeadlineExceeded):
        pending.envelope()
    assert collector.ended == [pending]


def test_without_a_callback_who_asks_is_told(
    attended: tuple[Channel, Any], until: Callable[..., None]
) -> None:
    """Nobody waits: the attendant keeps the deadline and takes the reply, if not at once."""
    channel, _ = attended
    pending = channel.submit(b"t", "echo", b"x", None, b"", 1, LONG, None)
    expiring = channel.submit(b"t", "silent", b"", None, b"", 1, 0.05, None)
    assert channel.unhurried
    until(lambda: pending.done and expiring.done, "the end of both")
    assert bytes(pending.envelope().body) == b"x"
    with pytest.raises(errors.DeadlineExceeded):
        expiring.envelope()
    assert not pending.cancelled


def test_who_wants_to_be_told_can_say_so_later(attended: tuple[Channel, Any]) -> None:
    channel, _ = attended
    collector, other = Collector(2), Collector()
    first = channel.submit(b"t", "after", b"50", None, b"", 1, LONG, None)
    second = channel.submit(b"t", "after", b"50", None, b"", 1, LONG, other, hurry=False)
    assert channel.unhurried
    assert first.notify(collector)
    assert second.notify(collector)
    assert not channel.unhurried
    collector.wait()
    assert other.ended == []
    assert channel.unhurried
    assert not first.notify(other)
    assert other.ended == []


def test_another_threads_call_takes_my_reply_and_calls_back(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint)
    collector = Collector(20)
    for _ in range(20):
        submit(channel, "echo", callback=collector)
    call(channel, "after", b"100")
    assert len(collector.ended) == 20


def test_errors_while_sending_are_raised_and_not_called_back(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint, max_bytes=1000)
    collector = Collector()
    with pytest.raises(errors.PayloadTooLarge, match="the limit is 1000"):
        submit(channel, "echo", bytes(2000), callback=collector)
    channel.close()
    with pytest.raises(errors.Closed):
        submit(channel, "echo", callback=collector)
    assert collector.ended == []


def test_the_attendant_takes_replies_that_nobody_waits_for(attended: tuple[Channel, Any]) -> None:
    channel, _ = attended
    collector = Collector(50)
    for number in range(50):
        submit(channel, "after", b"%d" % (5 * number), callback=collector)
    collector.wait()
    assert {bytes(pending.envelope().body) for pending in collector.ended} == {b"after"}
    assert channel.stats()["outstanding_calls"] == 0


def test_the_attendant_takes_a_reply_that_has_no_deadline(attended: tuple[Channel, Any]) -> None:
    channel, _ = attended
    collector = Collector()
    submit(channel, "after", b"300", timeout=None, callback=collector)
    collector.wait()


def test_the_attendant_keeps_the_deadline(attended: tuple[Channel, Any]) -> None:
    channel, _ = attended
    collector = Collector()
    submit(channel, "silent", timeout=0.1, callback=collector)
    collector.wait()
    with pytest.raises(errors.DeadlineExceeded):
        collector.ended[0].envelope()


def test_the_attendant_keeps_a_deadline_that_comes_before_the_one_it_sleeps_for(
    attended: tuple[Channel, Any], until: Callable[..., None]
) -> None:
    """The server stands still, so nothing else wakes the attendant."""
    channel, server = attended
    call(channel, "echo")
    server.pause()
    late, soon = Collector(), Collector()
    submit(channel, "silent", timeout=1000.0, callback=late)
    until(lambda: stands_in("zmqcore-attendant", "_wait"), "it sleeps")
    submit(channel, "silent", timeout=0.1, callback=soon)
    soon.wait()
    assert late.ended == []


def test_the_attendant_notices_a_killed_server(
    attended: tuple[Channel, Any], until: Callable[..., None]
) -> None:
    channel, server = attended
    collector = Collector(3)
    for _ in range(3):
        submit(channel, "silent", timeout=None, callback=collector)
    until(lambda: stands_in("zmqcore-attendant", "_wait"), "it sleeps")
    server.kill()
    collector.wait()
    with pytest.raises(errors.PeerLost):
        collector.ended[0].envelope()


def test_close_calls_back(attended: tuple[Channel, Any]) -> None:
    channel, _ = attended
    collector = Collector()
    submit(channel, "silent", callback=collector)
    channel.close()
    assert len(collector.ended) == 1
    with pytest.raises(errors.Closed, match="closed before the reply"):
        collector.ended[0].envelope()


@pytest.mark.usefixtures("quick_switches")
def test_the_attendant_works_beside_threads_that_call(attended: tuple[Channel, Any], team: Any) -> None:
    channel, _ = attended
    collector = Collector(2000)

    def ask() -> None:
        for number in range(500):
            assert call(channel, "echo", b"%d" % number) == b"%d" % number

    def post() -> None:
        for _ in range(1000):
            submit(channel, "echo", callback=collector)

    for work in (ask, ask, post, post):
        team.start(work)
    team.join(120.0)
    collector.wait()
    assert len(set(map(id, collector.ended))) == 2000


@pytest.mark.usefixtures("quick_switches")
def test_an_attendant_is_never_dismissed_while_something_is_outstanding(
    attended: tuple[Channel, Any],
) -> None:
    """Each request ends just as the attendant finds nothing to do; the next one must call it back."""
    channel, _ = attended
    for _ in range(3000):
        collector = Collector()
        submit(channel, "echo", callback=collector)
        collector.wait()


class Sleepless:
    """What the attendant looks after; asked again while it reports that it needs nobody."""

    def __init__(self, attendant: Attendant) -> None:
        self.attendant = attendant
        self.asked = 0
        self.again = threading.Event()
        self.fd, self._write_end = os.pipe()
        self.led = False

    def attend(self) -> float | None:
        self.asked += 1
        if self.asked == 1:
            # As when another thread submits between the channel's decision and the attendant's bookkeeping.
            self.attendant.attend(self)
            return None
        self.again.set()
        return None

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write_end)


def test_who_asks_for_attention_while_being_dismissed_gets_it(attendant: Attendant) -> None:
    thing = Sleepless(attendant)
    attendant.attend(thing)
    try:
        assert thing.again.wait(LONG), "forgotten"
    finally:
        attendant.close()
        thing.close()


def test_closing_the_attendant_twice_is_fine(attendant: Attendant) -> None:
    thing = Sleepless(attendant)
    attendant.attend(thing)
    assert thing.again.wait(LONG)
    attendant.close()
    read_end, write_end = os.pipe()
    other = [
        os.pipe() for _ in range(3)
    ]  # whoever gets the attendant's old descriptors must not be written to
    attendant.close()
    attendant.attend(thing)
    ready, _, _ = select.select([read_end, *(end for end, _ in other)], [], [], 0)
    for pair in [(read_end, write_end), *other]:
        os.close(pair[0])
        os.close(pair[1])
    thing.close()
    assert ready == []


def test_a_callback_that_raises_is_reported_and_disturbs_nobody(
    start_server: Callable[..., Any], connect: Callable[..., Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = connect(start_server().endpoint)
    seen: list[tuple[type[BaseException], BaseException | None, object]] = []

    def hook(unraisable: Any) -> None:
        seen.append((unraisable.exc_type, unraisable.exc_value, unraisable.object))
        assert unraisable.exc_traceback is not None

    monkeypatch.setattr(sys, "unraisablehook", hook)

    def fail(_: Pending) -> None:
        raise LookupError("in the callback")

    collector = Collector(2)
    submit(channel, "echo", callback=collector)
    submit(channel, "echo", callback=fail)
    submit(channel, "echo", callback=collector)
    assert call(channel, "after", b"100") == b"after"
    collector.wait()
    assert [(kind, str(value), thing) for kind, value, thing in seen] == [
        (LookupError, "in the callback", fail)
    ]


def test_the_interpreters_own_hook_takes_what_a_callback_raises(
    start_server: Callable[..., Any], connect: Callable[..., Channel], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    channel = connect(start_server().endpoint)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    def fail(_: Pending) -> None:
        raise LookupError("in the callback")

    submit(channel, "echo", callback=fail)
    assert call(channel, "after", b"50") == b"after"
    assert "LookupError: in the callback" in capfd.readouterr().err


def test_a_callback_may_call(attended: tuple[Channel, Any]) -> None:
    channel, _ = attended
    got: list[bytes] = []
    over = threading.Event()

    def again(_: Pending) -> None:
        got.append(call(channel, "echo", b"nested"))
        if len(got) < 10:
            submit(channel, "echo", callback=again)
        else:
            over.set()

    submit(channel, "echo", callback=again)
    assert over.wait(LONG)
    assert got == [b"nested"] * 10


def test_callbacks_that_submit_the_next_request_do_not_nest_without_end(
    attended: tuple[Channel, Any],
) -> None:
    """A closed loop of 500 requests that each start the next one: the stack must not grow with the traffic.

    It may with what is outstanding: a callback's request may find that other replies have come.
    """
    channel, _ = attended
    left = [5_000]
    deepest = 0
    over = threading.Event()
    local = threading.local()

    def again(_: Pending) -> None:
        nonlocal deepest
        local.depth = getattr(local, "depth", 0) + 1
        deepest = max(deepest, local.depth)
        left[0] -= 1
        if left[0] > 0:
            submit(channel, "echo", callback=again, timeout=60.0)
        elif channel.stats()["outstanding_calls"] == 0:
            over.set()
        local.depth -= 1

    for _ in range(500):
        submit(channel, "echo", callback=again, timeout=60.0)
    assert over.wait(60.0)
    assert deepest < 500, deepest


def test_a_flood_of_callbacks_does_not_hold_a_caller_beyond_its_deadline(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    """The caller leads, and each round of its loop brings another reply that belongs to somebody else."""
    channel = connect(start_server().endpoint)
    over = False
    rounds = 0

    def again(_: Pending) -> None:
        nonlocal rounds
        rounds += 1
        if not over and rounds < 5000:
            submit(channel, "echo", callback=again)
            time.sleep(0.005)  # so that the reply has come when the leader looks again

    submit(channel, "echo", callback=again)
    timeout = 0.2
    while rounds <= 5:  # it takes long enough for the flood to be one
        with pytest.raises(errors.DeadlineExceeded):
            call(channel, "silent", timeout=timeout)
        timeout *= 2
    over = True
    assert rounds < 5000, "the callbacks came first for as long as they came"


def test_a_cancelled_request_is_over_and_not_answered(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint)
    collector = Collector()
    pending = submit(channel, "after", b"100", callback=collector)
    assert pending.cancel()
    assert not pending.cancel()
    assert pending.done
    with pytest.raises(errors.Closed, match="cancelled"):
        pending.envelope()
    assert json.loads(call(channel, "report"))["port.cancelled"] == 1
    assert call(channel, "after", b"200") == b"after"
    stats = channel.stats()
    assert (stats["cancelled"], stats["late_replies"], stats["outstanding_calls"]) == (1, 0, 0)
    assert collector.ended == []


def test_a_reply_that_crosses_the_cancel_is_dropped(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    server = start_server()
    channel = connect(server.endpoint)
    pending = submit(channel, "echo", b"x", callback=Collector())
    assert call(connect(server.endpoint), "echo", b"y") == b"y"  # by one thread: it has answered both
    assert pending.cancel()
    assert call(channel, "echo", b"z") == b"z"
    stats = channel.stats()
    assert (stats["cancelled"], stats["late_replies"]) == (1, 1)


def test_cancelling_wakes_who_waits(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)
    leads = submit(channel, "silent", timeout=None)
    follows = submit(channel, "silent", timeout=None)

    def wait(pending: Pending) -> None:
        with pytest.raises(errors.Closed, match="cancelled"):
            pending.envelope()

    team.start(wait, leads)
    until(lambda: channel.led, "a leader")
    team.start(wait, follows)
    until(lambda: waiting_threads() == 2, "a follower")
    assert follows.cancel()
    assert leads.cancel()
    team.join()


def test_two_threads_may_wait_for_one_request(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)
    pending = submit(channel, "after", b"300")

    def wait() -> None:
        assert bytes(pending.envelope().body) == b"after"

    team.start(wait)
    until(lambda: channel.led, "a leader")
    team.start(wait)
    team.join()
