"""close() with threads inside, and what may come from a peer that does not keep to the protocol."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import zmq
from channel_support import Puppet
from waiting_support import waiting_threads

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._frame import pack, pinned
from zmqcore._pending import Pending

LONG = 20.0


def call(channel: Channel, method: str, body: bytes = b"", timeout: float | None = LONG) -> bytes:
    return bytes(channel.call(b"t", method, body, None, b"", 1, timeout).body)


def test_close_ends_every_thread_inside(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)

    def ask() -> None:
        with pytest.raises(errors.Closed):
            call(channel, "silent", timeout=None)

    for _ in range(8):
        team.start(ask)
    until(lambda: channel.stats()["outstanding_calls"] == 8 and channel.led, "eight calls")
    channel.close()
    team.join()
    channel.close()
    assert channel.state_name == "closed"
    assert channel.clean
    for attempt in (lambda: call(channel, "echo"), lambda: channel.ping(1.0)):
        with pytest.raises(errors.Closed, match="is closed"):
            attempt()
    assert channel.attend() is None
    assert not channel.wait_open(0.1)


def until_closed(work: Callable[[int], object]) -> None:
    for number in itertools.count():
        try:
            work(number)
        except errors.Closed:
            return


@pytest.mark.usefixtures("quick_switches")
def test_close_while_threads_come_and_go(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    server = start_server()
    for _ in range(25):
        channel = connect(server.endpoint)

        def work(channel: Channel = channel) -> None:
            until_closed(lambda _: call(channel, "echo", timeout=None))

        def post(channel: Channel = channel) -> None:
            def cast(number: int) -> None:
                channel.send("cast", b"t", "count", b"%d %d" % (id(channel), number), None, b"", 1, None)

            until_closed(cast)

        threads = [team.start(work) for _ in range(3)] + [team.start(post)]
        until(lambda channel=channel: channel.stats()["replies"] > 3 and channel.stats()["casts"] > 0, "work")
        channel.close()
        for thread in threads:
            thread.join(LONG)
    team.join()


def test_close_from_a_callback(start_server: Callable[..., Any], connect: Callable[..., Channel]) -> None:
    channel = connect(start_server().endpoint)
    channel.submit(b"t", "echo", b"", None, b"", 1, LONG, lambda _: channel.close())
    with pytest.raises(errors.Closed):
        call(channel, "silent", timeout=None)


def test_close_while_connecting(
    nowhere: Any, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(nowhere.endpoint, open=False)

    def wait() -> None:
        assert not channel.wait_open(None)

    def ask() -> None:
        with pytest.raises(errors.Closed):
            call(channel, "echo", timeout=None)

    for work in (wait, ask, wait, ask):
        team.start(work)
    until(lambda: waiting_threads() == 4, "all wait")
    channel.close()
    team.join()


def test_a_finalizer_may_use_the_channel(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    """The buffer's last owner goes when libzmq has sent it. What its finalizer does must not meet a held lock."""
    channel = connect(start_server().endpoint)
    finalized = threading.Event()

    class Exporter(bytearray):
        def __del__(self) -> None:
            channel.send("cast", b"t", "count", b"finalizer 1", None, b"", 1, LONG)
            finalized.set()

    def work() -> None:
        channel.call(b"t", "mirror", b"", [Exporter(100_000)], b"", 1, LONG)
        while not finalized.is_set():
            call(channel, "echo")

    team.start(work)
    team.join()


def test_a_callbacks_finalizer_may_use_the_channel(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(start_server().endpoint)

    class Callback:
        def __call__(self, _: Pending) -> None:
            """Never called: the request is cancelled."""

        def __del__(self) -> None:
            call(channel, "echo")

    def work() -> None:
        channel.submit(b"t", "silent", b"", None, b"", 1, LONG, Callback()).cancel()

    team.start(work)
    team.join()


@pytest.mark.parametrize("size", [1 << 10, 1 << 16, 1 << 20, (16 << 20) + 1])
@pytest.mark.parametrize("count", [1, 3])
def test_large_buffers_go_both_ways(
    start_server: Callable[..., Any], connect: Callable[..., Channel], size: int, count: int
) -> None:
    channel = connect(start_server().endpoint)
    buffers = [os.urandom(size) for _ in range(count)]
    envelope = channel.call(b"t", "mirror", b"body", list(buffers), b"", 1, LONG)
    assert bytes(envelope.body) == b"body"
    assert [bytes(buffer) for buffer in envelope.buffers] == buffers
    assert all(buffer.readonly for buffer in envelope.buffers)
    # Ours are released by now: the port has answered after reading all of them.
    assert pinned()["sent_bytes"] == 0
    assert pinned()["received_bytes"] == size * count
    view = envelope.buffers[0]
    del envelope
    assert bytes(view[:10]) == buffers[0][:10]  # the view keeps its memory


def test_large_buffers_of_many_threads_do_not_mix(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(start_server().endpoint)

    def work(mine: int) -> None:
        for number in range(40):
            buffers = [bytes([mine, number]) * (20_000 + 1000 * i) for i in range(mine)]
            envelope = channel.call(b"t", "mirror", b"", list(buffers), b"", 1, LONG)
            assert [bytes(buffer) for buffer in envelope.buffers or []] == buffers

    for mine in range(6):
        team.start(work, mine)
    team.join(60.0)


def test_signals_do_not_tear_multipart_messages(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    """libzmq's send can end in EINTR between two parts; the rest must follow all the same."""
    channel = connect(start_server().endpoint)
    ticks = []
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        for number in range(400):
            buffers = [b"%d %d" % (number, i) for i in range(60)]
            envelope = channel.call(b"t", "mirror", b"", list(buffers), b"", 1, LONG)
            assert [bytes(buffer) for buffer in envelope.buffers] == buffers
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ticks


GOOD = pack("reply", id=1, body=b"good")

GARBAGE = {
    "empty": [b""],
    "text": [b"HTTP/1.1 400 Bad Request\r\n\r\n"],
    "a header's beginning": [GOOD[0][:39]],
    "truncated": [GOOD[0][:-1]],
    "too long": [GOOD[0] + b"x"],
    "another version": [GOOD[0][:2] + b"\x02" + GOOD[0][3:]],
    "kind 0": [GOOD[0][:3] + b"\x00" + GOOD[0][4:]],
    "kind 255": [GOOD[0][:3] + b"\xff" + GOOD[0][4:]],
    "a call": pack("call", id=1),
    "many parts": [b"x", b"", b"y" * 1000, b""],
    "a delimiter": [b"", *GOOD],
    "all ones": [b"\xff" * 200],
    "an ack of what was never sent": pack("ack", ack=99),
    "a hello without an instance": pack("hello", id=1, body=b"short"),
    "a hello of number 0": pack("hello", id=0, body=bytes(16)),
    "a hello of what was never sent": pack("hello", id=7, body=bytes(16)),
}


MALFORMED_REPLIES = {
    "a buffer that does not come": pack("reply", id=1, buffers=[b"1", b"2"])[:2],
    "no buffer at all": pack("reply", id=1, buffers=[b"1"])[:1],
    "a buffer too many": [*GOOD, b"surplus"],
}


@pytest.mark.parametrize("name", MALFORMED_REPLIES)
def test_a_malformed_reply_ends_its_call(
    puppet: Puppet, connect: Callable[..., Channel], team: Any, name: str
) -> None:
    """It says which request it answers, so nobody waits for the deadline."""
    channel = connect(puppet.endpoint)

    def answer() -> None:
        puppet.take()
        puppet.send(MALFORMED_REPLIES[name])
        puppet.take()
        puppet.send(pack("reply", id=2, body=b"good"))

    team.start(answer)
    with pytest.raises(errors.ProtocolError, match="other buffers than it announces"):
        call(channel, "m")
    assert channel.stats()["garbage"] == 1
    assert call(channel, "m") == b"good"
    team.join()


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_counted_and_the_reply_still_found(
    puppet: Puppet, connect: Callable[..., Channel], team: Any, name: str
) -> None:
    channel = connect(puppet.endpoint)

    def answer() -> None:
        puppet.take()
        puppet.send(GARBAGE[name])
        puppet.send(GOOD)

    team.start(answer)
    assert call(channel, "m") == b"good"
    assert channel.stats()["garbage"] == 1
    assert channel.clean is False  # nothing has acknowledged the call
    team.join()


def test_replies_to_nobody_are_counted(puppet: Puppet, connect: Callable[..., Channel], team: Any) -> None:
    channel = connect(puppet.endpoint)

    def answer() -> None:
        puppet.take()
        for number in (0, 2, 77, 2**64 - 1):
            puppet.send(pack("reply", id=number))
        puppet.send(GOOD)
        puppet.send(GOOD)

    team.start(answer)
    assert call(channel, "m") == b"good"
    team.join()
    channel.attend()
    assert channel.stats()["late_replies"] >= 4
    assert channel.stats()["replies"] == 1


@pytest.mark.parametrize("options", [{"window_messages": 0}, {"window_bytes": 0}, {"window_messages": -1}])
def test_an_impossible_window_is_refused(
    context: zmq.Context[zmq.Socket[bytes]], options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="it must be a whole number, at least 1"):
        Channel(context, "tcp://127.0.0.1:1", **options)


def test_a_channel_that_cannot_be_made_leaves_nothing_open(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with pytest.raises(zmq.ZMQError):
        Channel(context, "nonsense://nowhere")

    def configure(_: object) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        Channel(context, "tcp://127.0.0.1:1", configure=configure)


def test_a_channel_dropped_without_close_warns_and_leaves_nothing_open(
    start_server: Callable[..., Any], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    channel = Channel(context, start_server().endpoint)
    assert channel.wait_open(LONG)
    with pytest.warns(ResourceWarning, match="nclosed socket"):
        del channel
