"""The acknowledged window: what a fast sender may have outstanding, and who goes first when there is room."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from memory_support import peak_rss_bytes, reset_peak_rss
from waiting_support import waiting_threads

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._frame import Envelope, pack, split

LONG = 30.0


def call(channel: Channel, method: str, body: bytes = b"", timeout: float | None = LONG) -> bytes:
    return bytes(channel.call(b"t", method, body, None, b"", 1, timeout).body)


def cast(channel: Channel, body: bytes, timeout: float | None = LONG, method: str = "count") -> int:
    return channel.send("cast", b"t", method, body, None, b"", 1, timeout)


def cast_now(channel: Channel, body: bytes) -> int:
    return channel.send_now("cast", b"t", "silent", body, None, b"", 1)


def report(channel: Channel) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(call(channel, "report"))
    return answer


class Acknowledger:
    """A ROUTER that takes and acknowledges only what the test tells it to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.taken: list[Envelope] = []
        self._come: list[Envelope] = []  # left over from a part that held more
        self._routing_id = b""

    def take(self, count: int) -> list[Envelope]:
        """Receive ``count`` further messages, without acknowledging any."""
        while len(self._come) < count:
            assert self.socket.poll(int(LONG * 1000)), f"{len(self.taken)} have come, no more"
            self._routing_id, head, *buffers = self.socket.recv_multipart()
            self._come.extend(Envelope.parse([envelope, *buffers]) for envelope in split(head))
        taken, self._come = self._come[:count], self._come[count:]
        self.taken.extend(taken)
        return taken

    def hello(self, first: Envelope) -> None:
        """Answer a connection's first message as a port does."""
        self.socket.send_multipart([self._routing_id, *pack("hello", id=first.id, body=bytes(16))])

    def nothing_comes(self) -> bool:
        return not self._come and not self.socket.poll(100)

    def acknowledge(self, number: int | None = None) -> None:
        ack = self.taken[-1].id if number is None else number
        self.socket.send_multipart([self._routing_id, *pack("ack", ack=ack)])


@pytest.fixture
def peer(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Acknowledger]:
    made = Acknowledger(context)
    yield made
    made.socket.close(linger=0)
    made.taken.clear()
    made._come.clear()


def test_at_most_a_window_of_messages_is_outstanding(
    peer: Acknowledger, connect: Callable[..., Channel]
) -> None:
    channel = connect(peer.endpoint, window_messages=5)
    for number in range(5):
        cast(channel, b"%d" % number)
    with pytest.raises(
        errors.Overloaded, match=r"5 messages and \d+ bytes are unacknowledged.*had not been sent"
    ):
        cast(channel, b"5", timeout=0.05)
    with pytest.raises(errors.Overloaded):
        call(channel, "echo", timeout=0.0)
    assert channel.stats()["window_waits"] == 2
    assert [envelope.id for envelope in peer.take(5)] == [1, 2, 3, 4, 5]
    peer.acknowledge(3)
    for number in (6, 7, 8):
        cast(channel, b"%d" % number)
    with pytest.raises(errors.Overloaded):
        cast(channel, b"9", timeout=0.05)
    assert [(envelope.id, bytes(envelope.body)) for envelope in peer.take(3)] == [
        (6, b"6"),
        (7, b"7"),
        (8, b"8"),
    ]
    assert peer.nothing_comes()


def test_at_most_a_window_of_bytes_is_outstanding(
    peer: Acknowledger, connect: Callable[..., Channel]
) -> None:
    channel = connect(peer.endpoint, window_bytes=10_000)
    cast(channel, bytes(4000))
    cast(channel, bytes(4000))
    with pytest.raises(errors.Overloaded):
        cast(channel, bytes(4000), timeout=0.05)
    cast(channel, bytes(1000))
    peer.take(3)
    peer.acknowledge()
    cast(channel, bytes(4000))
    assert channel.stats()["window_bytes"] < 10_000


def test_buffers_count_as_bytes(peer: Acknowledger, connect: Callable[..., Channel]) -> None:
    channel = connect(peer.endpoint, window_bytes=10_000)
    channel.send("cast", b"t", "m", b"", [bytes(6000)], b"", 1, LONG)
    with pytest.raises(errors.Overloaded):
        channel.send("cast", b"t", "m", b"", [bytes(6000)], b"", 1, 0.05)
    peer.take(1)


def test_one_message_larger_than_the_window_goes_alone(
    peer: Acknowledger, connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(peer.endpoint, window_bytes=1000)
    cast(channel, bytes(5000))
    with pytest.raises(errors.Overloaded):
        cast(channel, b"", timeout=0.05)
    peer.take(1)
    peer.acknowledge()
    cast(channel, b"")
    team.start(cast, channel, bytes(5000))
    peer.take(1)
    assert peer.nothing_comes()
    peer.acknowledge()
    peer.take(1)
    team.join()


def test_an_acknowledgement_of_what_was_never_sent_is_garbage(
    peer: Acknowledger, connect: Callable[..., Channel]
) -> None:
    channel = connect(peer.endpoint, window_messages=2)
    cast(channel, b"")
    cast(channel, b"")
    peer.take(2)
    peer.acknowledge(3)
    peer.acknowledge(2**64 - 1)
    with pytest.raises(errors.Overloaded):
        cast(channel, b"", timeout=0.2)
    assert channel.stats()["garbage"] == 2
    peer.acknowledge(2)
    cast(channel, b"")
    # An older acknowledgement takes nothing back.
    peer.acknowledge(1)
    assert not channel.clean


@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_tiny_window_does_not_stall(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, window: int
) -> None:
    channel = connect(start_server().endpoint, window_messages=window)

    def work(mine: int) -> None:
        for number in range(50):
            cast(channel, b"%d %d" % (mine, number))
            assert call(channel, "echo", b"x") == b"x"

    for mine in range(4):
        team.start(work, mine)
    team.join(120.0)
    assert (report(channel)["casts"], report(channel)["disorder"]) == (200, 0)


def acknowledged(channel: Channel) -> int:
    stats = channel.stats()
    return stats["casts"] - stats["window_messages"]


def blocked(channel: Channel, team: Any, until: Callable[..., None]) -> None:
    """Wait until all of the team, but who has given up, are parked: they wait for room."""
    until(lambda: channel.stats()["window_waits"] >= team.started, "all wait")
    until(lambda: waiting_threads() == team.alive, "all are parked")


def test_blocked_senders_are_served_in_order(
    peer: Acknowledger, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(peer.endpoint, window_messages=2)
    cast(channel, b"first")
    cast(channel, b"second")
    for number in range(10):
        team.start(cast, channel, b"%d" % number)
        blocked(channel, team, until)
    peer.take(2)
    while len(peer.taken) < 12:
        peer.acknowledge()
        peer.take(min(2, 12 - len(peer.taken)))
    team.join()
    assert [bytes(envelope.body) for envelope in peer.taken[2:]] == [b"%d" % number for number in range(10)]


def test_a_blocked_senders_deadline_ends_it_and_not_the_others(
    peer: Acknowledger, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(peer.endpoint, window_messages=1)
    cast(channel, b"first")

    def give_up() -> None:
        with pytest.raises(errors.Overloaded, match=r"gave up after [\d.]+ s"):
            cast(channel, b"never", timeout=0.3)

    team.start(cast, channel, b"a")  # leads
    blocked(channel, team, until)
    hasty = team.start(give_up)
    blocked(channel, team, until)
    team.start(cast, channel, b"b")
    blocked(channel, team, until)
    hasty.join(LONG)
    for _ in range(3):
        peer.take(1)
        peer.acknowledge()
    team.join()
    assert [bytes(envelope.body) for envelope in peer.taken] == [b"first", b"a", b"b"]


def test_a_leader_that_gives_up_sending_leaves_the_others_a_leader(
    peer: Acknowledger, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(peer.endpoint, window_messages=1)
    cast(channel, b"first")

    def give_up() -> None:
        with pytest.raises(errors.Overloaded):
            cast(channel, b"never", timeout=0.3)

    leader = team.start(give_up)
    blocked(channel, team, until)
    for number in range(3):
        team.start(cast, channel, b"%d" % number)
    blocked(channel, team, until)
    leader.join(LONG)
    for _ in range(4):
        peer.take(1)
        peer.acknowledge()
    team.join()


def test_a_large_message_waits_no_longer_than_its_turn(
    peer: Acknowledger, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    """It needs nearly the whole window; small ones that came after it must not overtake it for ever."""
    channel = connect(peer.endpoint, window_bytes=10_000)
    small, large = bytes(900), bytes(8_000)
    for _ in range(10):
        cast(channel, small)
    team.start(cast, channel, large)
    blocked(channel, team, until)
    for number in range(4):
        team.start(cast, channel, b"%d" % number + small)
        blocked(channel, team, until)
    peer.take(10)
    # Room comes bit by bit: at first enough for a small one, never at once for the large one.
    for number in range(1, 11):
        peer.acknowledge(number)
        until(lambda number=number: acknowledged(channel) >= number, "heard")
    after = peer.take(2)
    peer.acknowledge()
    peer.take(3)
    team.join()
    assert len(after[0].body) == len(large), "overtaken"


@pytest.mark.usefixtures("quick_switches")
def test_order_is_kept_with_several_threads_blocked(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(start_server(batch_delay=0.001).endpoint, window_messages=64)

    def work(mine: int) -> None:
        for number in range(1500):
            cast(channel, b"%d %d" % (mine, number))

    for mine in range(6):
        team.start(work, mine)
    team.join(120.0)
    seen = report(channel)
    assert (seen["casts"], seen["disorder"]) == (9000, 0)
    assert channel.stats()["window_waits"] > 0


def test_a_fast_caster_and_a_slow_server_keep_memory_bounded_and_drop_nothing(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    server = start_server(batch=32, batch_delay=0.01)
    channel = connect(server.endpoint, window_messages=256, window_bytes=1 << 22)
    padding = bytes(64 << 10)
    reset_peak_rss()
    before = peak_rss_bytes()
    server_before = report(channel)["max_rss_bytes"]
    total = 4000  # 250 MiB in all
    most = 0
    for number in range(total):
        cast(channel, padding + b" me %d" % number)
        most = max(most, channel.stats()["window_bytes"])
    seen = report(channel)
    assert (seen["casts"], seen["disorder"]) == (total, 0)
    assert most <= 1 << 22
    assert channel.stats()["window_waits"] > 0
    grown = peak_rss_bytes() - before
    # The window is 4 MiB; libzmq, sockets and allocators have theirs. Unbounded it would be 250 MiB.
    assert grown < 64 << 20
    assert seen["max_rss_bytes"] - server_before < 64 << 20


def test_a_server_that_receives_nothing_stops_the_sender_and_loses_nothing(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint, window_messages=1000)
    call(channel, "pause", b"1500")
    sent = 0
    try:
        while sent < 2000:
            cast(channel, b"me %d" % sent, timeout=0.1)
            sent += 1
    except errors.Overloaded:
        pass
    # The call before them may still be unacknowledged.
    assert sent in (999, 1000)
    seen = report(channel)
    assert (seen["casts"], seen["disorder"]) == (sent, 0)


def test_close_ends_blocked_senders(
    peer: Acknowledger, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(peer.endpoint, window_messages=1)
    cast(channel, b"")

    def work() -> None:
        with pytest.raises(errors.Closed):
            cast(channel, b"", timeout=None)

    for _ in range(4):
        team.start(work)
        blocked(channel, team, until)
    channel.close()
    team.join()


def test_a_loss_ends_blocked_senders_and_says_that_nothing_was_sent(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    server = start_server()
    channel = connect(server.endpoint, window_messages=1)
    server.pause()
    cast(channel, b"me 0")

    def work() -> None:
        with pytest.raises(errors.PeerLost) as caught:
            cast(channel, b"me 1", timeout=None)
        assert not caught.value.executed_possible

    for _ in range(4):
        team.start(work)
        blocked(channel, team, until)
    server.kill()
    team.join()


def test_callbacks_are_not_held_up_by_a_blocked_sender(
    peer: Acknowledger, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    """The sender that finds no room may have taken a reply; its callback must run although the sender parks."""
    channel = connect(peer.endpoint, window_messages=2, spin=0.0)
    called = threading.Event()
    for _ in range(200):
        called.clear()
        call_id = channel.submit(b"t", "m", b"", None, b"", 1, LONG, lambda _: called.set())
        cast(channel, b"fills the window")
        peer.take(2)
        leader = team.start(cast, channel, b"1")
        until(lambda: channel.led, "a leader")
        peer.socket.send_multipart([peer._routing_id, *pack("reply", id=call_id_of(call_id))])
        follower = team.start(cast, channel, b"2")
        assert called.wait(LONG), "the callback was forgotten"
        peer.acknowledge()
        peer.take(2)
        peer.acknowledge()
        leader.join(LONG)
        follower.join(LONG)
    team.join()


def call_id_of(pending: object) -> int:
    return int(repr(pending).split()[1])


def test_a_channel_that_only_casts_is_clean_when_looked_after(
    start_server: Callable[..., Any], connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)
    for number in range(10):
        cast(channel, b"me %d" % number)
    until(lambda: channel.attend() is None and channel.clean, "the acknowledgement")


def test_what_would_have_to_wait_is_not_sent_now(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel = connect(start_server().endpoint, window_messages=3, window_bytes=10_000)
    assert cast_now(channel, b"not connected yet") == 0
    first = cast(channel, b"me 1")
    call(channel, "echo")
    assert [cast_now(channel, b"me %d" % number) for number in (2, 3)] == [first + 2, first + 3]
    assert cast_now(channel, bytes(20_000)) == 0
    call(channel, "echo")
    channel.retire(lambda _: None)
    assert cast_now(channel, b"it is to close") == 0
    seen = report(channel)
    assert (seen["casts"], seen["disorder"]) == (3, 0)


def test_a_full_window_is_not_waited_for_now(
    peer: Acknowledger, connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    channel = connect(peer.endpoint, window_messages=4)
    cast(channel, b"1")
    (taken,) = peer.take(1)
    peer.hello(taken)
    until(lambda: channel.look() or channel.peer_instance, "the hello")
    assert [cast_now(channel, b"x") for _ in range(5)] == [2, 3, 4, 0, 0]
    peer.take(3)
    peer.acknowledge()
    # This looks at what has come; what is sent now does so only now and then.
    assert cast(channel, b"waits") == 5
    assert cast_now(channel, b"x") == 6
    peer.take(2)
    assert peer.nothing_comes()
    assert channel.stats()["casts"] == 6
