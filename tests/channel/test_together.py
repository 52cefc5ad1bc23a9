"""Small messages that follow one another closely leave together: in order, all of them, and soon."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._frame import Envelope, pack, split

LONG = 20.0
"""Seconds until a test gives up: a hang, not a promise about speed."""


class Silent:
    """A ROUTER that takes messages and acknowledges none, part by part."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.routing_id = b""

    def part(self) -> list[Envelope]:
        """Return the envelopes of the next message."""
        assert self.socket.poll(int(LONG * 1000)), "no more has come"
        self.routing_id, head, *buffers = self.socket.recv_multipart()
        return [Envelope.parse([envelope, *buffers]) for envelope in split(head)]

    def parts(self, last: int) -> list[list[Envelope]]:
        """Return the messages up to the one that holds the envelope with the id ``last``."""
        came = [self.part()]
        while came[-1][-1].id < last:
            came.append(self.part())
        return came

    def answer(self, kind: str, **fields: Any) -> None:
        self.socket.send_multipart([self.routing_id, *pack(kind, **fields)])


@pytest.fixture
def peer(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Silent]:
    made = Silent(context)
    yield made
    made.socket.close(linger=0)


def cast(channel: Channel, body: bytes = b"x", timeout: float = LONG) -> int:
    return channel.send("cast", b"t", "m", body, None, b"", 0, timeout)


def ids(parts: list[list[Envelope]]) -> list[int]:
    return [envelope.id for part in parts for envelope in part]


def threads() -> set[str]:
    """Return the ids of all threads of this process, also of those that Python does not know."""
    return {path.name for path in Path("/proc/self/task").iterdir()}


def test_the_first_ones_go_alone_and_many_go_together(peer: Silent, connect: Callable[..., Channel]) -> None:
    channel = connect(peer.endpoint)
    assert cast(channel) == 1
    assert [envelope.id for envelope in peer.part()] == [1]  # before anything follows it
    bodies = [b"%d" % number * (number % 50) for number in range(2, 1001)]
    for body in bodies:
        cast(channel, body)
    parts = peer.parts(1000)
    assert ids(parts) == list(range(2, 1001))
    assert [bytes(envelope.body) for part in parts for envelope in part] == bodies
    assert max(len(part) for part in parts) > 1
    stats = channel.stats()
    assert stats["casts"] == 1000
    together = [part for part in parts if len(part) > 1]
    assert stats["batches"] >= len(together)
    assert stats["batched"] - sum(map(len, together)) == stats["batches"] - len(together)


def test_what_is_held_leaves_although_nobody_looks(peer: Silent, connect: Callable[..., Channel]) -> None:
    channel = connect(peer.endpoint)
    for number in range(1, 30):
        cast(channel)
        if number > 10:
            # Nothing is sent, and nobody waits, until the peer has it.
            assert ids(peer.parts(number))[-1] == number
    assert channel.stats()["batched"] > 0


def test_no_part_is_longer_than_everybody_takes(peer: Silent, connect: Callable[..., Channel]) -> None:
    channel = connect(peer.endpoint)
    sizes = [0, 10, 16_000, 16_300, 16_384, 20_000, 60_000, 70_000, 1] * 12
    for size in sizes:
        cast(channel, bytes(size))
    came = []
    while len(came) < len(sizes):
        assert peer.socket.poll(int(LONG * 1000))
        _, head = peer.socket.recv_multipart()
        envelopes = split(head)
        assert len(envelopes) == 1 or len(head) <= 65536
        came.extend(envelopes)
    assert [Envelope.parse([envelope]).body.nbytes for envelope in came] == sizes
    assert [Envelope.parse([envelope]).id for envelope in came] == list(range(1, len(sizes) + 1))


def test_a_buffer_is_behind_what_was_held(peer: Silent, connect: Callable[..., Channel]) -> None:
    channel = connect(peer.endpoint)
    for _ in range(20):
        cast(channel)
    large = bytearray(b"large") * 20_000
    channel.send("cast", b"t", "m", b"", [large], b"", 0, LONG)
    cast(channel)
    parts = peer.parts(22)
    assert ids(parts) == list(range(1, 23))
    (with_buffer,) = [part for part in parts if part[0].buffers]
    assert [envelope.id for envelope in with_buffer] == [21]
    assert bytes(with_buffer[0].buffers[0]) == large


def test_a_call_and_a_cancel_are_behind_what_was_held(peer: Silent, connect: Callable[..., Channel]) -> None:
    channel = connect(peer.endpoint)
    pendings = [channel.submit(b"t", "m", b"", None, b"", 0, LONG, None) for _ in range(20)]
    assert pendings[-1].cancel()
    with pytest.raises(errors.DeadlineExceeded):
        channel.call(b"t", "m", b"", None, b"", 0, 0.05)
    came = [envelope for part in peer.parts(21) for envelope in part]
    order = [(envelope.kind, envelope.id) for envelope in came]
    assert order == [*(("call", number) for number in range(1, 21)), ("cancel", 20), ("call", 21)]
    for pending in pendings[:-1]:
        peer.answer("reply", id=pendings.index(pending) + 1, ack=21)
    for pending in pendings[:-1]:
        assert pending.wait(LONG)


def test_who_waits_for_a_held_one_has_it_sent(peer: Silent, connect: Callable[..., Channel]) -> None:
    """Each of them waits at once, so what is held may not wait for anybody else."""
    channel = connect(peer.endpoint)
    for number in range(1, 200):
        pending = channel.submit(b"t", "m", b"%d" % number, None, b"", 0, LONG, None)
        if number > 20:
            waiter = threading.Thread(target=pending.wait)
            waiter.start()
            assert ids(peer.parts(number))[-1] == number
            peer.answer("reply", id=number)  # no ack: the window goes on filling
            waiter.join(LONG)
            assert pending.answered


def test_a_leader_that_sleeps_misses_no_reply(
    peer: Silent, connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    """What others send while a thread polls must not swallow the edge of its reply, whoever hands it to libzmq."""
    channel = connect(peer.endpoint, spin=0.0)
    for _ in range(10):
        cast(channel)
    rounds = 300
    answered = []

    def caller() -> None:
        for _ in range(rounds):
            channel.call(b"t", "m", b"", None, b"", 0, LONG)
            answered.append(None)

    def caster() -> None:
        while len(answered) < rounds:
            cast(channel)
            time.sleep(0)

    def server() -> None:
        done = 0
        while done < rounds:
            for envelope in peer.part():
                if envelope.kind == "call":
                    peer.answer("reply", id=envelope.id, ack=envelope.id - 10 if envelope.id > 10 else 0)
                    done += 1

    for work in (caller, caster, server):
        team.start(work)
    until(lambda: len(answered) == rounds, "every call is answered")
    team.join()


def test_what_is_held_when_the_connection_breaks_is_lost_and_said_to_be(
    context: zmq.Context[zmq.Socket[bytes]], connect: Callable[..., Channel]
) -> None:
    peer = Silent(context)
    channel = connect(peer.endpoint)
    pendings = [channel.submit(b"t", "m", b"", None, b"", 0, LONG, None) for _ in range(20)]
    peer.parts(20)
    peer.socket.close(linger=0)
    while channel.usable:
        # Held, with nobody who looks but now and then.
        try:
            pendings.append(channel.submit(b"t", "m", b"", None, b"", 0, LONG, None))
        except errors.PeerLost:
            break
    for pending in pendings:
        with pytest.raises(errors.PeerLost):
            pending.envelope()
    assert channel.stats()["lost"] == len(pendings)


def test_a_full_window_is_not_exceeded_by_what_is_held(peer: Silent, connect: Callable[..., Channel]) -> None:
    channel = connect(peer.endpoint, window_messages=12)
    for _ in range(12):
        cast(channel)
    with pytest.raises(errors.Overloaded):
        cast(channel, timeout=0.05)
    assert ids(peer.parts(12)) == list(range(1, 13))
    peer.answer("ack", ack=12)
    assert cast(channel) == 13


def test_retiring_and_closing_leave_nothing(
    peer: Silent, connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    channel = connect(peer.endpoint)
    for _ in range(100):
        cast(channel)
    clean: list[Channel] = []
    channel.retire(clean.append, LONG)
    assert ids(peer.parts(100)) == list(range(1, 101))
    assert not clean
    peer.answer("ack", ack=100)
    until(lambda: channel.attend() is None, "the acknowledgement comes")
    assert clean == [channel]
    channel.close()


def test_the_thread_is_there_while_a_socket_is_that_has_held_something(
    peer: Silent, connect: Callable[..., Channel]
) -> None:
    first, second = connect(peer.endpoint), connect(peer.endpoint)
    before = threads()
    for _ in range(3):
        for channel in (first, second):
            cast(channel)
    assert threads() == before
    for channel in (first, second):
        for _ in range(50):
            cast(channel)
    assert len(threads() - before) == 1
    first.close()
    assert len(threads() - before) == 1
    second.close()
    assert threads() == before
    third = connect(peer.endpoint)
    for _ in range(50):
        cast(third)
    assert len(threads() - before) == 1


def test_a_child_knows_nothing_of_what_its_parent_holds(
    peer: Silent, connect: Callable[..., Channel]
) -> None:
    channel = connect(peer.endpoint)
    for _ in range(2000):
        cast(channel)
    child = os.fork()
    if child == 0:  # pragma: no cover - in another process
        code = 1
        try:
            own = zmq.Context()
            mine = Channel(own, peer.endpoint)
            if mine.wait_open(LONG):
                for _ in range(50):
                    cast(mine, b"child")
                time.sleep(0.5)  # the thread of the child hands over what is held
                mine.close()
                code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    of_child, of_parent = [], []
    while len(of_child) + len(of_parent) < 2050:
        for envelope in peer.part():
            (of_child if bytes(envelope.body) == b"child" else of_parent).append(envelope.id)
    assert of_child == list(range(1, 51))
    assert of_parent == list(range(1, 2001))


@pytest.mark.usefixtures("quick_switches")
def test_each_of_many_threads_keeps_its_order(
    peer: Silent, connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(peer.endpoint)

    def sender(name: int) -> None:
        for number in range(100):
            cast(channel, b"%d %d" % (name, number))

    def reader() -> None:
        last: dict[bytes, int] = {}
        count = 0
        while count < 3200:
            for envelope in peer.part():
                name, number = bytes(envelope.body).split()
                assert int(number) == last.get(name, -1) + 1
                last[name] = int(number)
                count += 1
            peer.answer("ack", ack=count)

    for name in range(32):
        team.start(sender, name)
    team.start(reader)
    team.join()
