"""One thread receives, in batches; it can be woken and closed; any thread replies."""

from __future__ import annotations

import itertools
import os
import queue
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from zmqcore import errors
from zmqcore._frame import pinned
from zmqcore._port import Port
from zmqcore._request import Request
from zmqcore._socket import waiters

LIMIT = 30.0


def take(port: Port, count: int, batch: int = 64) -> list[Request]:
    """Receive until ``count`` requests have come."""
    requests: list[Request] = []
    while len(requests) < count:
        came = port.receive(batch, LIMIT)
        assert came, f"{len(requests)} of {count} requests, no more"
        requests += came
    return requests


def receive_all(port: Port, handle: Callable[[Request], None]) -> None:
    """Receive until the port is closed."""
    while True:
        try:
            requests = port.receive()
        except errors.Closed:
            return
        for request in requests:
            handle(request)


def test_what_a_request_tells(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send(
        "call", topic=b"t", method="m\N{SNOWMAN}", body=b"b", metadata=b"d", codec=7, remaining_ms=60_000
    )
    client.send("cast", method="c")
    client.send("fanout", remaining_ms=0)
    call, cast, fanout = take(port, 3)
    assert (call.kind, cast.kind, fanout.kind) == ("call", "cast", "fanout")
    assert (call.method, bytes(call.envelope.body), call.envelope.metadata, call.envelope.codec) == (
        "m\N{SNOWMAN}",
        b"b",
        b"d",
        7,
    )
    assert call.remaining is not None
    assert 0 < call.remaining <= 60
    assert (cast.remaining, cast.expired) == (None, False)
    assert (fanout.remaining, fanout.expired) == (0.0, True)
    assert (call.wants_reply, cast.wants_reply, fanout.wants_reply) == (True, False, False)
    assert call.reply(b"r")
    assert not call.wants_reply
    assert "answered" in repr(call)


def test_a_batch_is_no_larger_than_asked_for(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    for _ in range(10):
        client.send("cast", flow=False)
    sizes: list[int] = []
    while sum(sizes) < 10:
        sizes.append(len(port.receive(4, LIMIT)))
    assert max(sizes) <= 4
    assert port.receive(4, 0) == []


def test_messages_of_one_peer_come_in_order(port: Port, bare: Callable[..., Any]) -> None:
    clients = [bare(port.endpoints[0]) for _ in range(3)]
    for number in range(300):
        for name, client in enumerate(clients):
            client.send("cast", flow=False, method=f"client-{name}", body=b"%d" % number)
    seen: dict[str, list[int]] = {}
    for request in take(port, 900, batch=7):
        seen.setdefault(request.method, []).append(int(bytes(request.envelope.body)))
    assert list(seen.values()) == [list(range(300))] * 3


@pytest.mark.parametrize("timeout", [0, 0.0, -1, 0.05])
def test_nothing_comes(port: Port, timeout: float) -> None:
    assert port.receive(64, timeout) == []


def test_several_endpoints(open_port: Callable[..., Port], bare: Callable[..., Any], tmp_path: Any) -> None:
    port = open_port("tcp://127.0.0.1:*", f"ipc://{tmp_path}/p")
    for endpoint in port.endpoints:
        bare(endpoint).send("cast")
    assert len(take(port, 2)) == 2


@pytest.mark.parametrize("spin", [0.0, 60e-6])
def test_wake_ends_receive(open_port: Callable[..., Port], spin: float) -> None:
    port = open_port(spin=spin)
    port.wake()
    port.wake()
    assert port.receive() == []  # for ever, but for the wake; two are one
    timer = threading.Timer(0.1, port.wake)
    timer.start()
    assert port.receive() == []
    timer.join()
    assert port.receive(64, 0.02) == []


def test_every_wake_is_noticed(port: Port) -> None:
    """Each wake waits for the one before to have been seen: a lost one is a hang."""
    woken = threading.Event()

    def wake() -> None:
        for _ in range(2000):
            woken.clear()
            port.wake()
            woken.wait(LIMIT)

    thread = threading.Thread(target=wake, daemon=True)
    thread.start()
    for _ in range(2000):
        started = time.monotonic()
        assert port.receive(64, LIMIT) == []
        assert time.monotonic() - started < LIMIT
        woken.set()
    thread.join(LIMIT)


@pytest.mark.parametrize("spin", [0.0, 60e-6])
def test_close_while_receiving(open_port: Callable[..., Port], spin: float) -> None:
    port = open_port(spin=spin)
    ended = threading.Event()

    def receive() -> None:
        receive_all(port, lambda _: None)
        ended.set()

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    time.sleep(0.1)
    port.close()
    assert ended.wait(LIMIT)
    thread.join()
    assert port.is_closed
    assert "closed" in repr(port)
    port.close()
    with pytest.raises(errors.Closed):
        port.receive()
    port.wake()
    port.goodbye()
    port.stats()


def test_close_frees_the_endpoint(open_port: Callable[..., Port]) -> None:
    first = open_port()
    endpoint = first.endpoints[0]
    first.close()
    give_up = time.monotonic() + LIMIT
    while True:
        try:
            second = open_port(endpoint)
            break
        except zmq.ZMQError:  # closing takes its time
            assert time.monotonic() < give_up
            time.sleep(0.01)
    assert second.endpoints == (endpoint,)
    assert second.instance != first.instance


def test_two_receivers_are_refused(port: Port) -> None:
    started = threading.Event()

    def receive() -> None:
        started.set()
        port.receive()

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    started.wait()
    time.sleep(0.05)
    with pytest.raises(errors.InternalError, match="two threads"):
        port.receive(64, 0)
    port.wake()
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert port.receive(64, 0) == []  # the refused one has not taken the first one's place


def test_an_interrupt_ends_receive_and_leaves_the_port_usable(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            port.receive()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    client.send("call", body=b"after")
    take(port, 1)[0].reply(b"ok")
    assert bytes(client.receive_kind("reply").body) == b"ok"


def test_an_endpoint_in_use_is_an_error_and_leaves_nothing_open(
    open_port: Callable[..., Port], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    taken = open_port().endpoints[0]
    with pytest.raises(zmq.ZMQError):
        Port(context, ["tcp://127.0.0.1:*", taken])
    with pytest.raises(zmq.ZMQError):
        Port(context, ["nonsense://"])


@pytest.mark.parametrize("spin", [0.0, 60e-6])
def test_other_threads_reply_while_the_receiver_is_blocked(
    open_port: Callable[..., Port], bare: Callable[..., Any], spin: float
) -> None:
    """Replying takes the socket's edge; each further request must be received all the same, or this hangs."""
    port = open_port(spin=spin)
    work: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def receive() -> None:
        receive_all(port, work.put)

    def answer() -> None:
        while (request := work.get()) is not None:
            request.reply(request.envelope.body)

    threads = [threading.Thread(target=target, daemon=True) for target in (receive, answer, answer, answer)]
    for thread in threads:
        thread.start()
    clients = [bare(port.endpoints[0]) for _ in range(4)]
    for number in range(1000):
        for client in clients:
            client.send("call", body=b"%d" % number)
        for client in clients:
            assert bytes(client.receive_kind("reply").body) == b"%d" % number
    port.close()
    for _ in range(3):
        work.put(None)
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()


@pytest.mark.parametrize("spin", [0.0, 60e-6])
def test_acknowledging_before_it_sleeps_loses_no_message(
    open_port: Callable[..., Port], bare: Callable[..., Any], spin: float
) -> None:
    """The port sends an acknowledgement as it is about to block. A message that comes just then must be seen."""
    port = open_port(spin=spin)
    taken = itertools.count(1)
    last = [0]

    def count(_: Request) -> None:
        last[0] = next(taken)

    def receive() -> None:
        receive_all(port, count)

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    client, other = bare(port.endpoints[0]), bare(port.endpoints[0])
    client.send("cast")
    client.receive_kind("hello")
    sent = 1
    for number in range(3000):
        client.send("cast")
        for _ in range(number % 200):  # a little later each time: somewhen as the acknowledgement is sent
            pass
        other.send("cast", flow=False)
        sent += 2
        client.acknowledged(client.sent)
        give_up = time.monotonic() + LIMIT
        while last[0] < sent:
            assert time.monotonic() < give_up, f"round {number}: a message that nobody wakes up for"
            time.sleep(0)
    port.close()
    thread.join(LIMIT)


def test_an_answer_is_given_once(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send("call")
    client.send("cast")
    call, cast = take(port, 2)
    assert call.error(b"no")
    for attempt in (call.reply, call.error):
        with pytest.raises(errors.InternalError, match="twice"):
            attempt(b"")
    with pytest.raises(errors.InternalError, match="wants no answer"):
        cast.reply(b"")
    assert bytes(client.receive_kind("error").body) == b"no"


def test_of_many_threads_that_answer_one_call_one_does(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    for _ in range(50):
        client.send("call")
        (call,) = take(port, 1)
        won: list[bool] = []
        start = threading.Barrier(4)

        def answer(call: Request = call, won: list[bool] = won, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                won.append(call.reply(b""))
            except errors.InternalError:
                won.append(False)

        threads = [threading.Thread(target=answer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False, False, False, True]


def test_an_answer_over_the_limit_can_be_replaced(
    open_port: Callable[..., Port], bare: Callable[..., Any]
) -> None:
    port = open_port(max_bytes=1000, max_buffers=2)
    client = bare(port.endpoints[0])
    client.send("call")
    (call,) = take(port, 1)
    with pytest.raises(errors.PayloadTooLarge, match="1000"):
        call.reply(bytes(2000))
    with pytest.raises(errors.PayloadTooLarge, match="2"):
        call.reply(b"", [b"1", b"2", b"3"])
    with pytest.raises(errors.PayloadTooLarge):
        call.reply(b"", [bytes(600), bytes(600)])
    assert call.wants_reply
    assert call.error(b"too large")
    assert bytes(client.receive_kind("error").body) == b"too large"
    assert pinned()["sent_buffers"] == 0


def test_an_answer_to_a_closed_port(port: Port, bare: Callable[..., Any]) -> None:
    bare(port.endpoints[0]).send("call")
    (call,) = take(port, 1)
    port.close()
    with pytest.raises(errors.Closed):
        call.reply(b"")


@pytest.mark.parametrize("flow", [True, False])
def test_a_reply_to_a_vanished_peer(port: Port, bare: Callable[..., Any], flow: bool) -> None:
    client = bare(port.endpoints[0])
    client.send("call", flow=flow)
    client.send("call", flow=flow)
    first, second = take(port, 2)
    client.socket.close(linger=0)
    give_up = time.monotonic() + LIMIT
    while port.stats()["undeliverable_replies"] == 0:
        # Until libzmq has noticed it takes replies and drops them.
        assert time.monotonic() < give_up
        probe = bare(port.endpoints[0])
        probe.send("ping")
        assert port.receive(64, 0.05) == []
        if first.wants_reply and time.monotonic() > give_up - LIMIT + 0.5:
            assert not first.reply(b"")
    assert not second.reply(b"")
    assert port.stats()["undeliverable_replies"] == 2
    other = bare(port.endpoints[0])
    other.send("call")
    assert take(port, 1)[0].reply(b"still serving")
    assert bytes(other.receive_kind("reply").body) == b"still serving"


def test_large_buffers_come_without_a_copy_and_go_back(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    data = [bytes([n]) * (300_000 + n) for n in range(3)]
    client.send("call", buffers=data)
    (call,) = take(port, 1)
    assert [bytes(buffer) for buffer in call.envelope.buffers] == data
    assert pinned()["received_buffers"] == 3
    assert call.reply(b"", call.envelope.buffers)
    assert [bytes(buffer) for buffer in client.receive_kind("reply").buffers] == data
    del call
    port.receive(64, 0.0)
    assert pinned()["received_buffers"] == 0


# -- standing by ---------------------------------------------------------------------------------------------

FOR_EVER = 1e6


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(LIMIT)
    return not thread.is_alive()


def test_who_stands_by_is_back_when_nobody_receives(port: Port) -> None:
    assert ended(in_thread(lambda: port.stand_by(0.001, FOR_EVER)))


def test_who_stands_by_stays_while_another_receives(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    came: list[Request] = []
    receiving = in_thread(lambda: receive_all(port, came.append))
    client.send("cast", flow=False)
    while not came:
        time.sleep(0.001)
    standing_by = in_thread(lambda: port.stand_by(0.001, FOR_EVER))
    standing_by.join(0.05)  # it looks fifty times
    assert standing_by.is_alive()
    with pytest.raises(errors.InternalError, match="two threads stand by"):
        port.stand_by(0.001, FOR_EVER)
    port.relieve()
    assert ended(standing_by)
    port.relieve()  # nobody stands by now: the next one is back at once
    assert ended(in_thread(lambda: port.stand_by(0.001, FOR_EVER)))
    # Nothing comes.
    assert ended(in_thread(lambda: port.stand_by(0.001, 0.01)))
    # The one who receives goes.
    standing_by = in_thread(lambda: port.stand_by(0.001, FOR_EVER))
    port.close()
    assert ended(receiving)
    assert ended(standing_by)


def test_standing_by_needs_no_descriptor(open_port: Callable[..., Port]) -> None:
    ports = [open_port() for _ in range(waiters()["idle"] + 1)]
    receiving = [in_thread(lambda port=port: receive_all(port, list)) for port in ports]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        standing_by = [in_thread(lambda port=port: port.stand_by(0.001, FOR_EVER)) for port in ports]
        for port in ports:
            port.relieve()
        assert all(map(ended, standing_by))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for port in ports:
        port.close()
    assert all(map(ended, receiving))
