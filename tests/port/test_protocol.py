"""What a bare DEALER sees: hello, acknowledgements, ping, goodbye; and a plain REQ socket."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from zmqcore._frame import Envelope, pack
from zmqcore._port import Port
from zmqcore._request import Request

LIMIT = 30.0


@pytest.mark.usefixtures("held")
def test_the_first_message_is_answered_by_a_hello(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.sent = 41
    client.send("cast")
    hello = client.receive()
    assert (hello.kind, hello.id, hello.ack) == ("hello", 42, 0)
    assert bytes(hello.body[:16]) == port.instance
    client.send("cast")
    assert {envelope.kind for envelope in client.acknowledged(43)} == {"ack"}


def test_who_does_not_count_on_it_gets_no_hello_and_no_acknowledgement(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client = bare(port.endpoints[0])
    for _ in range(600):
        client.send("cast", flow=False)
    client.send("call", flow=False)
    until(lambda: len(held) == 601, "all requests")
    held[-1].reply(b"")
    reply = client.receive()
    assert (reply.kind, reply.id, reply.ack) == ("reply", 601, 0)
    assert client.nothing_comes(250)
    assert port.stats()["acks"] == 0
    assert port.stats()["peers"] == 0


@pytest.mark.usefixtures("held")
def test_casts_are_acknowledged_before_the_port_goes_to_sleep(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    for _ in range(10):
        client.send("cast")
    acks = [envelope for envelope in client.acknowledged(10) if envelope.kind == "ack"]
    # Cumulative, so fewer than messages; the last one covers all.
    assert 1 <= len(acks) <= 10
    assert client.nothing_comes(250)


def take_without_waiting(port: Port, count: int, batch: int) -> None:
    """Receive ``count`` requests as a busy port does: it never blocks, so it never acknowledges for being idle."""
    give_up = time.monotonic() + LIMIT
    while count:
        came = port.receive(min(batch, count), 0)
        count -= len(came)
        assert time.monotonic() < give_up
        time.sleep(0 if came else 0.001)


def test_a_busy_port_acknowledges_every_256_messages(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    for _ in range(1000):
        client.send("cast")
    take_without_waiting(port, 1000, 50)
    assert port.stats()["acks"] == 3
    acks = [envelope.ack for envelope in client.acknowledged(768) if envelope.kind == "ack"]
    assert acks == [256, 512, 768]
    assert client.nothing_comes()
    assert port.receive(64, 0.05) == []  # idle: the rest
    client.acknowledged(1000)


def test_a_busy_port_acknowledges_every_mebibyte(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    for _ in range(5):
        client.send("cast", body=bytes(300_000))
    take_without_waiting(port, 3, 1)
    assert port.stats()["acks"] == 0
    take_without_waiting(port, 2, 1)
    assert [envelope.ack for envelope in client.acknowledged(4) if envelope.kind == "ack"] == [4]
    assert client.nothing_comes()


def test_a_large_out_of_band_buffer_counts(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send("cast", buffers=[bytes(1 << 20)])
    take_without_waiting(port, 1, 1)
    assert client.acknowledged(1)[-1].kind == "ack"


def test_a_single_large_call_is_left_to_its_reply(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send("call", buffers=[bytes(2 << 20)])
    take_without_waiting(port, 1, 1)
    assert port.stats()["acks"] == 0
    client.send("call")
    take_without_waiting(port, 1, 1)
    assert port.stats()["acks"] == 1
    assert client.acknowledged(2)[-1].kind == "ack"


def test_a_reply_carries_the_acknowledgement(
    port: Port, held: list[Request], bare: Callable[..., Any]
) -> None:
    client = bare(port.endpoints[0])
    client.send("call")
    assert client.receive().kind == "hello"
    client.send("call")
    give_up = time.monotonic() + LIMIT
    while len(held) < 2:
        assert time.monotonic() < give_up
    held[1].reply(b"")
    reply = client.receive_kind("reply")
    assert (reply.id, reply.ack) == (2, 2)


def test_a_long_call_is_acknowledged_while_it_runs(
    port: Port, held: list[Request], bare: Callable[..., Any]
) -> None:
    client = bare(port.endpoints[0])
    client.send("call")
    came = client.acknowledged(1)
    assert [envelope.kind for envelope in came] == ["hello", "ack"]
    held[0].reply(b"at last")
    assert bytes(client.receive_kind("reply").body) == b"at last"
    assert client.nothing_comes(250)


def test_a_fast_call_is_not_acknowledged_twice(
    port: Port, serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    serve(port)
    client = bare(port.endpoints[0])
    for _ in range(50):
        client.send("call")
        client.receive_kind("reply")
    assert client.nothing_comes(250)
    # A machine that stalls for 0.1 s may cause a few.
    assert port.stats()["acks"] < 10


def test_ping_is_answered_without_a_request(
    port: Port, held: list[Request], bare: Callable[..., Any]
) -> None:
    client = bare(port.endpoints[0])
    client.send("ping")
    assert client.receive().kind == "hello"
    pong = client.receive()
    assert (pong.kind, pong.id, pong.ack) == ("pong", 1, 1)
    client.send("ping", flow=False, id=77)
    assert client.receive_kind("pong").id == 77
    assert held == []


@pytest.mark.usefixtures("held")
def test_goodbye_is_told_to_who_is_there_and_who_comes(port: Port, bare: Callable[..., Any]) -> None:
    here, silent, late = (bare(port.endpoints[0]) for _ in range(3))
    here.send("ping")
    here.receive_kind("pong")
    port.goodbye()
    assert here.receive().kind == "goodbye"
    late.send("ping")
    assert [late.receive().kind for _ in range(3)] == ["hello", "goodbye", "pong"]
    assert silent.nothing_comes()


def test_a_port_has_settled_when_its_peers_have_their_replies(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client = bare(port.endpoints[0])
    client.send("call")
    until(lambda: held, "the call")
    port.goodbye()
    assert not port.settled()
    held[0].reply(b"")
    assert not port.settled()
    client.receive_kind("reply")
    client.send("goodbye")
    until(port.settled, "settled")


def test_a_port_has_settled_when_those_who_came_late_have_their_refusals(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    """Closed earlier, it would leave them in doubt whether their calls have been executed."""
    port.goodbye()
    assert port.settled()
    late = bare(port.endpoints[0])
    late.send("call")
    assert bytes(late.receive_kind("error").body).startswith(b"Draining")
    assert late.nothing_comes(200)
    assert not port.settled()
    late.send("goodbye")
    until(port.settled, "settled")
    assert held == []


@pytest.mark.usefixtures("held")
def test_a_port_has_settled_when_busy_peers_have_said_so(
    port: Port, bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    """One that has sent much may be held up, with more on the way that it sends before it hears the goodbye."""
    idle, busy = bare(port.endpoints[0]), bare(port.endpoints[0])
    idle.send("ping")
    idle.receive_kind("pong")
    for _ in range(64):
        busy.send("ping")
        busy.receive_kind("pong")
    port.goodbye()
    assert not port.settled()
    busy.send("goodbye")
    until(port.settled, "settled")


def test_the_last_goodbye_says_what_has_been_taken(
    port: Port, held: list[Request], bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client, polite = bare(port.endpoints[0]), bare(port.endpoints[0])
    for each in (client, polite):
        each.send("ping")
        each.receive_kind("pong")
    client.send("cast")
    until(lambda: held, "the cast")
    port.goodbye()
    assert client.receive_kind("goodbye").id == 0
    assert polite.receive_kind("goodbye").id == 0
    polite.send("goodbye")
    polite.send("ping")
    polite.receive_kind("pong")  # so it has been heard
    assert port.farewell()
    last = client.receive_kind("goodbye")
    assert (last.id, last.ack) == (1, 2)
    assert polite.nothing_comes()


@pytest.mark.usefixtures("held")
def test_a_goodbye_of_the_peer_forgets_it(
    port: Port, bare: Callable[..., Any], until: Callable[..., None]
) -> None:
    client = bare(port.endpoints[0])
    client.send("ping")
    client.receive_kind("pong")
    assert port.stats()["peers"] == 1
    client.send("goodbye")
    until(lambda: port.stats()["peers"] == 0, "forgotten")


@pytest.mark.usefixtures("held")
def test_a_new_connection_is_a_new_peer(port: Port, bare: Callable[..., Any]) -> None:
    for number in (1, 100):
        client = bare(port.endpoints[0])
        client.sent = number - 1
        client.send("ping")
        assert client.receive_kind("hello").id == number
        client.socket.close()


def test_a_plain_req_socket_is_served(
    port: Port, serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    serve(port)
    client = bare(port.endpoints[0], zmq.REQ)
    for number in range(5):
        body = b"%d" % number
        client.socket.send_multipart(pack("call", id=number, body=body, buffers=[b"part"]))
        answer = client.receive()
        assert (answer.kind, answer.id, bytes(answer.body)) == ("reply", number, body)
    assert port.stats()["garbage"] == 0


@pytest.mark.parametrize("parts", [[b""], [b"x"], [b"x", b"y"], pack("reply"), [*pack("call"), b"surplus"]])
def test_a_req_socket_that_sends_garbage_does_not_stop_the_port(
    port: Port,
    serve: Callable[..., Any],
    bare: Callable[..., Any],
    parts: list[bytes],
    until: Callable[..., None],
) -> None:
    serve(port)
    bare(port.endpoints[0], zmq.REQ).socket.send_multipart(parts)
    until(lambda: port.stats()["garbage"] == 1, "counted")
    client = bare(port.endpoints[0], zmq.REQ)
    client.socket.send_multipart(pack("call", id=9))
    assert client.receive().id == 9


def test_requests_over_the_limits_are_refused_with_an_error(
    open_port: Callable[..., Port], serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    port = open_port(max_bytes=10_000, max_buffers=3)
    serve(port)
    client = bare(port.endpoints[0])
    client.send("call", buffers=[b""] * 4)
    assert b"PayloadTooLarge" in bytes(client.receive_kind("error").body)
    client.send("call", buffers=[bytes(6000), bytes(6000)])
    assert b"PayloadTooLarge" in bytes(client.receive_kind("error").body)
    client.send("cast", buffers=[b""] * 4)
    client.socket.send_multipart([*pack("call", id=50, flags=1, buffers=[b"1", b"2"])[:2]])
    assert b"ProtocolError" in bytes(client.receive_kind("error").body)
    client.socket.send_multipart([*pack("call", id=51, flags=1), b"surplus"])
    assert b"ProtocolError" in bytes(client.receive_kind("error").body)
    client.send("call", body=b"good", id=52)
    assert bytes(client.receive_kind("reply").body) == b"good"
    stats = port.stats()
    assert (stats["too_large"], stats["garbage"]) == (3, 2)


def test_a_frame_over_the_limit_ends_only_its_own_connection(
    open_port: Callable[..., Port], serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    port = open_port(max_bytes=100_000)
    serve(port)
    good, bad = bare(port.endpoints[0]), bare(port.endpoints[0])
    good.send("call")
    good.receive_kind("reply")
    bad.send("call", body=bytes(1_000_000))
    assert bad.nothing_comes(100)
    good.send("call", body=b"good")
    assert bytes(good.receive_kind("reply").body) == b"good"


def test_an_envelope_over_a_limit_below_that_of_a_frame_is_refused(
    open_port: Callable[..., Port], serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    port = open_port(max_bytes=10_000)
    serve(port)
    client = bare(port.endpoints[0])
    client.send("call", body=bytes(20_000))
    assert b"10000" in bytes(client.receive_kind("error").body)
    client.send("cast", body=bytes(20_000))
    # Together they may be longer than one may be.
    client.send_together([("call", {"body": bytes(9_000)})] * 4)
    for _ in range(4):
        assert bytes(client.receive_kind("reply").body) == bytes(9_000)
    assert port.stats()["too_large"] == 2


def test_replies_to_who_does_not_read_are_dropped_and_counted(
    open_port: Callable[..., Port], bare: Callable[..., Any]
) -> None:
    port = open_port(high_water=5)
    client = bare(port.endpoints[0])
    client.socket.setsockopt(zmq.RCVHWM, 5)
    slow = client.socket.context.socket(zmq.DEALER)
    slow.setsockopt(zmq.RCVHWM, 1)
    slow.connect(port.endpoints[0])
    try:
        sent = 0
        while port.stats()["dropped_replies"] == 0:
            slow.send_multipart(pack("call", id=sent))
            sent += 1
            for request in port.receive(64, LIMIT):
                request.reply(b"x" * 100_000)
            assert sent < 5000, "nothing is ever dropped"
    finally:
        slow.close(linger=0)
    client.send("call")
    (call,) = [request for request in port.receive(64, LIMIT) if request.wants_reply][-1:]
    assert call.reply(b"fine")
    assert Envelope.parse(client.socket.recv_multipart()).kind == "hello"
