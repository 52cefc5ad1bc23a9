"""What a port sends to whom: no more than it was told by the peer's hello, or than is assumed of who says nothing."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._port import Port
from zmqcore._request import Request

LIMIT = 30.0
ROOM = 1 << 18
ASSUMED = 1 << 28


def hello(max_bytes: int, max_buffers: int) -> bytes:
    return bytes(16) + struct.pack("<QI", max_bytes + ROOM, max_buffers)


def take(port: Port, count: int) -> list[Request]:
    give_up = time.monotonic() + LIMIT
    requests: list[Request] = []
    while len(requests) < count:
        assert time.monotonic() < give_up
        requests += port.receive(64, 0.1)
    return requests


@pytest.fixture
def huge() -> Iterator[mmap.mmap]:
    """A byte more than is assumed; nobody touches it, so it takes no memory."""
    with mmap.mmap(-1, ASSUMED + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as made:
        yield made


def test_a_hello_is_answered_like_any_first_message(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send("hello", body=hello(1000, 3), id=41)
    assert port.receive(64, 0.1) == []
    answer = client.receive()
    assert (answer.kind, answer.id, answer.ack) == ("hello", 41, 0)
    assert bytes(answer.body) == port.instance + struct.pack("<QI", ASSUMED + ROOM, 1024)
    client.send("call", id=41)
    take(port, 1)
    client.send("hello", body=hello(900, 3), id=42)
    assert port.receive(64, 0.2) == []
    acks = [client.receive()]
    assert (acks[0].kind, acks[0].ack) == ("ack", 41), "a hello is not counted, and not answered twice"
    assert client.nothing_comes()
    assert port.stats()["garbage"] == 0


@pytest.mark.parametrize("send", ["reply", "error", "item"])
def test_nothing_over_it_is_sent(port: Port, bare: Callable[..., Any], send: str) -> None:
    client = bare(port.endpoints[0])
    client.send("hello", body=hello(1000, 3), id=1)
    client.sent = 0
    client.send("call")
    (request,) = take(port, 1)
    answer = getattr(request, send)
    with pytest.raises(errors.PayloadTooLarge, match=r"^payload of 1001 bytes; the limit is 1000$"):
        answer(bytes(1001))
    with pytest.raises(errors.PayloadTooLarge, match=r"^payload of 1200 bytes; the limit is 1000$"):
        answer(bytes(500), [bytes(100)] + [bytes(300)] * 2)
    with pytest.raises(errors.PayloadTooLarge, match=r"\b4 out-of-band buffers; the limit is 3$"):
        answer(b"", [b"x"] * 4)
    assert request.wants_reply
    assert answer(bytes(100), [bytes(300)] * 3)
    came = client.receive_kind(send)
    assert (len(came.body), len(came.buffers)) == (100, 3)
    # It holds for that connection only.
    other = bare(port.endpoints[0])
    other.send("call")
    (request,) = take(port, 1)
    assert request.reply(bytes(2000))


def test_the_ports_own_limits_hold_all_the_same(
    open_port: Callable[..., Port], bare: Callable[..., Any]
) -> None:
    port = open_port(max_bytes=1000, max_buffers=2)
    client = bare(port.endpoints[0])
    client.send("hello", body=hello(5000, 9), id=1)
    client.send("call")
    (request,) = take(port, 1)
    with pytest.raises(errors.PayloadTooLarge, match="the limit is 1000"):
        request.reply(bytes(1001))
    with pytest.raises(errors.PayloadTooLarge, match="the limit is 2"):
        request.reply(b"", [b""] * 3)


def test_who_says_nothing_takes_what_is_assumed(
    open_port: Callable[..., Port], bare: Callable[..., Any], huge: mmap.mmap
) -> None:
    port = open_port(max_bytes=1 << 30, max_buffers=9000)
    for kind in (zmq.DEALER, zmq.REQ):
        client = bare(port.endpoints[0], kind)
        client.send("call", flow=kind == zmq.DEALER)
        (request,) = take(port, 1)
        with pytest.raises(errors.PayloadTooLarge, match=f"payload of {ASSUMED + 1} bytes; .* {ASSUMED}$"):
            request.reply(b"", [huge])
        with pytest.raises(errors.PayloadTooLarge, match="1025 out-of-band buffers; the limit is 1024"):
            request.reply(b"", [b""] * 1025)
        assert request.reply(b"", [b""] * 1024)


def test_who_takes_more_gets_it(context: zmq.Context[zmq.Socket[bytes]], open_port: Callable[..., Port],
                                huge: mmap.mmap) -> None:  # fmt: skip
    """Within the process libzmq hands it over as it is."""
    port = open_port("inproc://port", max_bytes=1 << 30, max_buffers=9000)
    channel = Channel(context, "inproc://port", max_bytes=1 << 29, max_buffers=2000)
    try:
        assert channel.wait_open(LIMIT)
        pending = channel.submit(b"t", "m", b"", None, b"", 1, LIMIT, None)
        (request,) = take(port, 1)
        with pytest.raises(errors.PayloadTooLarge, match="2001 out-of-band buffers; the limit is 2000"):
            request.reply(b"", [b""] * 2001)
        assert request.reply(b"", [huge] + [b""] * 1999)
        buffers = pending.envelope().buffers
        assert (len(buffers), len(buffers[0])) == (2000, ASSUMED + 1)
        del buffers, pending, request
    finally:
        channel.close()


def test_a_hello_that_says_too_little_is_garbage(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send("hello", body=hello(0, 0)[:27], id=1)
    client.send("call")
    (request,) = take(port, 1)
    assert request.reply(b"", [b""] * 1024)
    assert port.stats()["garbage"] == 1
    # Below the room for the rest nothing is left.
    client.send("hello", body=bytes(28), id=2)
    client.send("call")
    (request,) = take(port, 1)
    with pytest.raises(errors.PayloadTooLarge, match="payload of 1 bytes; the limit is 0"):
        request.reply(b"x")
    assert request.reply(b"")


def test_what_is_refused_is_named_as_the_limit_was_set(
    open_port: Callable[..., Port], serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    port = open_port(max_bytes=1 << 20, max_buffers=4)
    serve(port)
    client = bare(port.endpoints[0])
    client.send("call", topic=b"t" * 100, body=b"b", buffers=[bytes(1 << 20)])
    assert bytes(client.receive_kind("error").body) == (
        b"PayloadTooLarge: payload of 1048577 bytes with 1 buffers; the limits are 1048576 and 4"
    )
    client.send("call", topic=b"t" * 100, body=b"", buffers=[bytes(1 << 20)])
    assert client.receive_kind("reply").id == client.sent
    client.send("call", metadata=bytes(262_200), buffers=[bytes(1 << 20)])
    assert bytes(client.receive_kind("error").body) == (
        b"PayloadTooLarge: envelope of 262240 bytes besides the body; the limit is 262144"
    )
    assert port.stats()["too_large"] == 2


def test_what_may_come_before_the_ports_hello_breaks_no_connection(
    open_port: Callable[..., Port], serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    port = open_port(max_bytes=1)
    serve(port)
    client = bare(port.endpoints[0])
    client.send("call", topic=b"t" * 1000, body=bytes(1 << 18))
    assert b"the limits are 1 and" in bytes(client.receive_kind("error").body)
