"""Several envelopes in one part: what comes together is taken one by one, what is answered leaves together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from zmqcore import errors
from zmqcore._frame import pack, split
from zmqcore._port import Port
from zmqcore._request import Request


def take(port: Port, count: int, at_a_time: int = 64) -> list[Request]:
    requests: list[Request] = []
    while len(requests) < count:
        came = port.receive(at_a_time, 20.0)
        assert came, f"{len(requests)} have come, no more"
        assert len(came) <= at_a_time
        requests.extend(came)
    return requests


def bodies(requests: list[Request]) -> list[bytes]:
    return [bytes(request.envelope.body) for request in requests]


@pytest.mark.parametrize("at_a_time", [1, 7, 64, 1000])
def test_they_are_taken_one_by_one_in_order(port: Port, bare: Callable[..., Any], at_a_time: int) -> None:
    client, other = bare(port.endpoints[0]), bare(port.endpoints[0])
    wanted = [b"%d" % number for number in range(300)]
    client.send_together([("cast", {"body": body}) for body in wanted[:150]])
    client.send_together([("cast", {"body": body}) for body in wanted[150:]])
    requests = take(port, 300, at_a_time)
    assert bodies(requests) == wanted
    assert port.receive(at_a_time, 0.0) == []
    port.flush()
    assert client.acknowledged(300)[-1].ack == 300
    other.send("cast", body=b"other")
    assert bodies(take(port, 1)) == [b"other"]


def test_a_request_of_many_keeps_what_it_refers_to(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send_together(
        [("call", {"body": b"%d" % number * 100, "method": f"m{number}"}) for number in range(50)]
    )
    kept = take(port, 50)[25]
    port.receive(64, 0.0)
    client.send_together([("cast", {"body": b"over" * 1000})] * 10)
    take(port, 10)
    assert (kept.method, bytes(kept.envelope.body)) == ("m25", b"25" * 100)


def test_calls_casts_pings_and_cancels_may_be_mixed(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send_together(
        [("call", {}), ("cast", {}), ("ping", {}), ("fanout", {}), ("cancel", {"id": 1}), ("call", {"id": 5})]
    )
    requests = take(port, 4)
    assert [request.kind for request in requests] == ["call", "cast", "fanout", "call"]
    assert [request.cancelled for request in requests] == [True, False, False, False]
    assert client.receive_kind("pong").id == 3
    requests[3].reply(b"end")
    assert client.receive_kind("reply").id == 5


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: part + b"\0",
        lambda part: part[:-1],
        lambda part: part + b"zC" + bytes(38),
        lambda part: part + part[:40].replace(b"zC", b"Zc"),
        lambda part: part + pack("call", flags=1, id=9, buffers=[b"b"])[0],
        lambda part: pack("call", flags=1, id=9, buffers=[b"b"])[0] + part,
    ],
)
def test_a_part_is_good_as_a_whole_or_not_at_all(
    port: Port, bare: Callable[..., Any], spoil: Callable[[bytes], bytes]
) -> None:
    client = bare(port.endpoints[0])
    good = b"".join(pack("call", flags=1, id=number)[0] for number in range(1, 11))
    assert len(split(good)) == 10
    with pytest.raises(errors.ProtocolError):
        split(spoil(good))
    client.socket.send(spoil(good))
    client.send("call", body=b"good", id=1)
    assert bodies(take(port, 1)) == [b"good"]
    assert port.stats()["garbage"] == 1


def test_no_buffers_follow_a_part_with_several(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.socket.send_multipart([pack("call", flags=1, id=1)[0] + pack("call", flags=1, id=2)[0], b"buffer"])
    client.send("call", body=b"good", id=1)
    assert bodies(take(port, 1)) == [b"good"]
    assert port.stats()["garbage"] == 1


def test_what_a_closed_port_has_not_taken_of_a_part_is_dropped(
    open_port: Callable[..., Port], bare: Callable[..., Any]
) -> None:
    port = open_port()
    client = bare(port.endpoints[0])
    client.send_together([("call", {})] * 100)
    take(port, 1, 1)
    port.close()
    with pytest.raises(errors.Closed):
        port.receive(1, 0.0)


def test_what_cannot_be_begun_is_set_aside_and_cancels_are_seen(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send_together([*([("call", {})] * 20), ("cancel", {"id": 3})])
    first = take(port, 1, 1)
    while port.stats()["cancelled"] == 0:
        assert port.receive(0, 0.01) == []
    assert port.stats()["set_aside"] == 19
    rest = take(port, 19, 5)
    assert [request.envelope.id for request in first + rest] == list(range(1, 21))
    assert [request.envelope.id for request in rest if request.cancelled] == [3]


def test_answers_of_one_batch_leave_together(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    client = bare(port.endpoints[0])
    client.send_together([("call", {"body": b"%d" % number}) for number in range(40)])
    client.receive_kind("hello") if port.receive(0, 1.0) == [] else None
    requests = take(port, 40)
    before = client.parts
    for request in requests:
        assert request.reply(request.envelope.body)
    answers = [client.receive_kind("reply") for _ in range(40)]
    assert [answer.id for answer in answers] == list(range(1, 41))
    assert [bytes(answer.body) for answer in answers] == [b"%d" % number for number in range(40)]
    assert {answer.ack for answer in answers} == {40}
    assert client.parts - before < 40
    assert port.stats()["batched"] > 0


def test_an_answer_does_not_wait_for_a_handler_that_takes_long(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    client = bare(port.endpoints[0])
    client.send_together([("call", {})] * 3)
    first, second, third = take(port, 3)
    second.reply(b"")
    third.reply(b"")
    # This thread is busy with the first one, and does not come by the port.
    assert {client.receive_kind("reply").id, client.receive_kind("reply").id} == {2, 3}
    first.reply(b"")
    assert client.receive_kind("reply").id == 1


def test_who_wants_its_answer_promptly_gets_it_alone(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    client = bare(port.endpoints[0])
    client.send_together([("call", {})] * 30, flags=1 | 4)
    for request in take(port, 30):
        request.reply(b"")
    before = client.parts
    client.receive_kind("reply")
    while client.receive_kind("reply").id < 30:
        pass
    assert port.stats()["batched"] == 0
    assert client.parts - before >= 30


def test_answers_of_another_thread_and_to_others_go_at_once(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    client = bare(port.endpoints[0])
    client.send_together([("call", {})] * 10)
    requests = take(port, 10)
    thread = threading.Thread(target=lambda: [request.reply(b"") for request in requests])
    thread.start()
    thread.join()
    assert [client.receive_kind("reply").id for _ in range(10)] == list(range(1, 11))
    assert port.stats()["batched"] == 0


def test_answers_to_several_clients_in_turn(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    clients = [bare(port.endpoints[0]) for _ in range(3)]
    for client in clients:
        client.send_together([("call", {"body": b"%d" % number}) for number in range(20)])
    requests = take(port, 60)
    for request in sorted(requests, key=lambda each: each.envelope.id):  # those of the three by turns
        request.reply(request.envelope.body)
    for client in clients:
        assert [bytes(client.receive_kind("reply").body) for _ in range(20)] == [b"%d" % n for n in range(20)]


def test_without_flow_every_answer_comes_alone(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    client = bare(port.endpoints[0], zmq.DEALER)
    client.send_together([("call", {})] * 10, flags=0)
    for request in take(port, 10):
        request.reply(b"")
    for number in range(1, 11):
        assert client.receive().id == number
    assert client.parts == 10


def test_answers_to_who_has_gone_are_counted(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    client = bare(port.endpoints[0])
    client.send_together([("call", {})] * 30)
    requests = take(port, 30)
    client.socket.close(linger=0)
    while port.stats()["undeliverable_replies"] == 0:
        if requests:
            requests.pop(0).reply(b"")
        port.receive(1, 0.01)
    assert port.stats()["peers"] == 0
    for request in requests:
        assert not request.reply(b"")


def test_that_one_client_has_gone_says_nothing_of_another(port: Port, bare: Callable[..., Any]) -> None:
    port.batching = True
    clients = {b"gone": bare(port.endpoints[0]), b"there": bare(port.endpoints[0])}
    for name, client in clients.items():
        client.send_together([("call", {"body": name})] * 30)
    requests = take(port, 60)
    of_gone, of_there = ([each for each in requests if bytes(each.envelope.body) == name] for name in clients)
    clients[b"gone"].socket.close(linger=0)
    answered = 0
    while not port.stats()["undeliverable_replies"]:
        of_gone[answered].reply(b"")
        # To hold this one, the other one has to be sent.
        assert of_there[answered].reply(b"")
        answered += 1
        port.receive(0, 0.1)
    for _ in range(answered):
        clients[b"there"].receive_kind("reply")


def test_closing_sends_what_is_held(open_port: Callable[..., Port], bare: Callable[..., Any]) -> None:
    port = open_port()
    port.batching = True
    client = bare(port.endpoints[0])
    client.send_together([("call", {})] * 30)
    requests = take(port, 30)
    for request in requests[:29]:
        request.reply(b"")
    port.close(linger=5.0)
    assert [client.receive_kind("reply").id for _ in range(29)] == list(range(1, 30))
