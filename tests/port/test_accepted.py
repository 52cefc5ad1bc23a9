"""Messages with an identity, as a bare DEALER sends them: when they are called finished, and that none runs again."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore._frame import pack
from zmqcore._port import Port
from zmqcore._request import Request

FLOW, IDENTIFIED = 1, 2
SENDER = 0xFEDCBA9876543210
LIMIT = 30.0


def send(client: Any, sequence: int, *, sender: int = SENDER, kind: str = "cast", **fields: Any) -> int:
    """Send an accepted message; return its id."""
    client.sent += 1
    metadata = struct.pack("<QQ", sender, sequence)
    fields = {"id": client.sent, "flags": FLOW | IDENTIFIED, "metadata": metadata, **fields}
    client.socket.send_multipart(pack(kind, **fields))
    return int(client.sent)


def told(client: Any, number: int) -> list[tuple[int, int]]:
    """Receive until everything up to ``number`` is told to be finished; return (finished, taken) of each ack."""
    came = []
    while not came or came[-1][0] < number:
        envelope = client.receive()
        if envelope.kind == "ack":
            came.append((envelope.id, envelope.ack))
    return came


def finished_within(client: Any, ms: int = 250) -> int:
    """Return the highest number that is told to be finished within the time; 0 for none."""
    highest = 0
    while not client.nothing_comes(ms):
        envelope = client.receive()
        if envelope.kind == "ack":
            highest = max(highest, envelope.id)
    return highest


def test_taken_is_not_finished(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client = bare(port.endpoints[0])
    for sequence in (1, 2, 3):
        send(client, sequence)
    taken = client.acknowledged(3)
    assert max(envelope.ack for envelope in taken) == 3
    assert {envelope.id for envelope in taken if envelope.kind == "ack"} == {0}
    until(lambda: len(held) == 3, "all three")
    assert [request.accepted for request in held] == [True] * 3
    held[1].finish()
    held[1].finish()  # the second time nothing happens
    assert finished_within(client) == 0  # the first one is before it
    held[0].finish()
    assert told(client, 2)[-1] == (2, 3)
    held[2].finish()
    assert told(client, 3)[-1] == (3, 3)


def test_a_late_one_does_not_hold_up_what_is_only_taken(
    port: Port, held: list[Request], bare: Callable[..., Any]
) -> None:
    client = bare(port.endpoints[0])
    send(client, 1)
    for _ in range(1000):
        client.send("cast")
    came = client.acknowledged(1001)
    assert all(envelope.id == 0 for envelope in came if envelope.kind == "ack")
    held[0].finish()
    assert told(client, 1)[-1][0] == 1001  # the others carry no identity


def test_many_are_told_together(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client = bare(port.endpoints[0])
    for sequence in range(1, 2001):
        send(client, sequence)
    until(lambda: len(held) == 2000, "all of them")
    client.acknowledged(2000)
    for request in held[:1000]:
        request.finish()
    assert [finished for finished, _ in told(client, 1000)] == [256, 512, 768, 1000]


def test_none_runs_twice(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    first, second = bare(port.endpoints[0]), bare(port.endpoints[0])
    for sequence in (1, 2, 3):
        send(first, sequence)
    until(lambda: len(held) == 3, "all three")
    held[0].finish()
    for sequence in (1, 2, 3, 4):  # the connection is lost, and all of it is sent again
        send(second, sequence)
    until(lambda: len(held) == 4, "the fourth")
    assert [request.envelope.identity for request in held] == [(SENDER, n) for n in (1, 2, 3, 4)]
    assert port.stats()["duplicates"] == 3
    assert told(second, 1)[-1][0] == 1  # had been finished; the others are not, though both have been taken
    held[3].finish()
    assert finished_within(second) <= 1
    held[1].finish()
    held[2].finish()
    assert told(second, 4)[-1] == (4, 4)
    send(second, 2)
    assert told(second, 5)[-1] == (5, 5)
    assert len(held) == 4


def test_another_sender_has_numbers_of_its_own(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client = bare(port.endpoints[0])
    for sender in (1, 2, 1, 3):
        send(client, 7, sender=sender, kind="fanout")
    until(lambda: len(held) == 3, "one of each")
    assert [(request.kind, request.envelope.identity) for request in held] == [
        ("fanout", (sender, 7)) for sender in (1, 2, 3)
    ]
    assert port.stats()["senders"] == 3


@pytest.mark.parametrize("step", [1, 63, 64, 1000, 10_000])
def test_what_has_come_is_known_for_8192_numbers(
    port: Port, held: list[Request], bare: Callable[..., Any], step: int
) -> None:
    client = bare(port.endpoints[0])
    sequence, last = 1, 12_000 // step * step + 1
    numbers = list(range(sequence, last + 1, step))
    for sequence in numbers:
        send(client, sequence)
    known = [n for n in numbers if n > last - 8192]
    for sequence in known:
        send(client, sequence)
    unknown = [n for n in range(last - 8191, last) if n not in set(numbers)][:100]
    for sequence in unknown:
        send(client, sequence)  # had not come yet, in whatever order
    client.acknowledged(client.sent)
    assert port.stats()["duplicates"] == len(known)
    assert len(held) == len(numbers) + len(unknown)


def test_one_without_room_for_its_buffers_is_finished_too(
    open_port: Callable[..., Port], bare: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    port = open_port(max_buffers=1)
    serve(port)
    client = bare(port.endpoints[0])
    number = send(client, 1, buffers=[b"a", b"b"])
    assert told(client, number)[-1] == (1, 1)
    assert port.stats()["too_large"] == 1


def test_what_is_finished_is_told_before_the_port_closes(
    open_port: Callable[..., Port], bare: Callable[..., Any]
) -> None:
    port = open_port()
    client = bare(port.endpoints[0])
    send(client, 1)
    send(client, 2)
    requests: list[Request] = []
    while len(requests) < 2:
        requests += port.receive()
    port.goodbye()
    assert not port.settled(0.0)
    for request in requests:
        request.finish()
    assert not port.settled(0.0)  # told, but nobody knows whether it has been heard
    client.socket.send_multipart(pack("goodbye", flags=FLOW))
    while not port.settled(0.0):
        port.receive(timeout=0.01)
    port.close(linger=2.0)
    assert told(client, 2)[-1] == (2, 2)


def test_without_flow_it_still_runs_once(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client = bare(port.endpoints[0])
    for _ in range(3):
        send(client, 1, flags=IDENTIFIED)
    until(lambda: port.stats()["duplicates"] == 2, "two more")
    held[0].finish()
    assert len(held) == 1
    assert client.nothing_comes()
