"""doctor --endpoint: what is told apart, against real sockets."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from zmqcore import Limits, Node, Server
from zmqcore.cli import endpoint_check
from zmqcore.cli.endpoint_check import examine

if TYPE_CHECKING:
    from conftest import Shop


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never answers is waited for less long; loopback answers within this, on a busy machine too."""
    monkeypatch.setattr(endpoint_check, "_PATIENCE", 2.0)


@contextmanager
def listener(answer: bytes, close: bool) -> Iterator[str]:
    """A plain TCP listener that sends *answer* to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                held.append(client)
                try:
                    client.sendall(answer)
                    if close:
                        client.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # a connection that only asks whether somebody accepts has gone already

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in held:
                client.close()


@contextmanager
def foreign(kind: int, **options: int) -> Iterator[tuple[str, zmq.Socket[bytes]]]:
    """A ZeroMQ socket that is no port of zmqcore."""
    with zmq.Context() as context, context.socket(kind) as sock:
        sock.linger = 0
        for name, value in options.items():
            setattr(sock, name, value)
        yield f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}", sock


def wrong(endpoint: str) -> tuple[str, dict[str, Any]]:
    """What is found to be wrong, and the facts."""
    diagnosis = examine(endpoint)
    assert not diagnosis.ok
    [problem] = diagnosis.problems
    assert problem.advice
    facts = diagnosis.facts["endpoint"]
    assert facts["speaks_zmqcore"] is False
    return problem.what, facts


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_server(shop: Shop, transport: str) -> None:
    _, announced = shop.serve()
    [endpoint] = [each for each in announced["endpoints"] if each.startswith(transport)]
    ran = shop.run("doctor", "--endpoint", endpoint)
    assert (ran.code, ran.err) == (0, ""), ran.out
    assert (ran.json["ok"], ran.json["problems"]) == (True, [])
    assert "versions" not in ran.json, "it looks at nothing else"
    facts = ran.json["endpoint"]
    assert (facts["accepts"], facts["speaks_zeromq"], facts["speaks_zmqcore"]) == (True, True, True)
    assert facts["mechanism"] == "NULL"
    assert len(bytes.fromhex(facts["instance"])) == 16
    assert facts["ping_p50_us"] > 0
    assert facts["handshake_ms"] > 0
    text = shop.run("doctor", "--endpoint", endpoint, "--no-json")
    assert text.code == 0
    assert all(word in text.out for word in (endpoint, facts["instance"], "ping p50", "as it should be"))


@pytest.mark.parametrize("message_bytes", [1 << 20, 1 << 40])
def test_the_server_tells_its_own_limits(message_bytes: int) -> None:
    with (
        Node("memory://limits", limits=Limits(message_bytes=message_bytes, buffers=77)) as node,
        Server(
            "limits", {"double": lambda number: 2 * number}, node=node, bind="tcp://127.0.0.1:*"
        ) as server,
    ):
        diagnosis = examine(server.endpoints[0])
        assert diagnosis.ok
        facts = diagnosis.facts["endpoint"]
        assert facts["message_bytes_at_most"] == message_bytes
        assert facts["buffers_at_most"] == 77


@pytest.mark.usefixtures("impatient")
def test_a_frozen_process_accepts_but_says_nothing(shop: Shop) -> None:
    process, announced = shop.serve("stock:Stock", "--bind", "tcp://127.0.0.1:*")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    what, facts = wrong(announced["endpoints"][0])
    assert "it sent nothing" in what
    assert "does not speak" not in what, "nobody knows"
    assert facts["accepts"] is True


def test_nothing_listens(shop: Shop) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{bound.getsockname()[1]}"
        ran = shop.run("doctor", "--endpoint", endpoint)
    assert ran.code == 6
    [problem] = ran.json["problems"]
    assert "refused" in problem["what"]
    assert ran.json["endpoint"]["accepts"] is False
    missing = shop.run("doctor", "--endpoint", f"ipc://{shop.temporary}/nobody", "--no-json")
    assert missing.code == 6
    assert "no such file" in missing.out
    assert "what to do:" in missing.out


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("answer", "close", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True, "HTTP/1.1 400"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False, "SSH-2.0"),
        (b"", False, "it sent nothing"),
        (b"\xff" * 5, False, "it sent"),
        (b"\xff" + bytes(80), False, "it sent"),
    ],
)
def test_something_that_does_not_speak_zeromq(answer: bytes, close: bool, said: str) -> None:
    with listener(answer, close) as endpoint:
        what, facts = wrong(endpoint)
    assert ("does not speak ZeroMQ" in what) is bool(answer), "only if it has said something else"
    assert said in what
    assert (facts["accepts"], facts["speaks_zeromq"]) == (True, False)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", [zmq.PUB, zmq.PULL, zmq.REP, zmq.ROUTER])
def test_another_zeromq_program(kind: int) -> None:
    with foreign(kind) as (endpoint, _):
        what, facts = wrong(endpoint)
    assert "speaks ZeroMQ, but not zmqcore" in what
    assert (facts["speaks_zeromq"], facts["zmtp"], facts["mechanism"]) == (True, "3.1", "NULL")
    # Which sockets take a DEALER: https://rfc.zeromq.org/spec/28/
    assert ("handshake_ms" in facts) == (kind in (zmq.REP, zmq.ROUTER))


@pytest.mark.usefixtures("impatient")
def test_one_that_wants_passwords() -> None:
    with foreign(zmq.ROUTER, plain_server=1) as (endpoint, _):
        what, facts = wrong(endpoint)
    assert "PLAIN" in what
    assert facts["mechanism"] == "PLAIN"


@pytest.mark.usefixtures("impatient")
def test_one_that_answers_nonsense() -> None:
    with foreign(zmq.ROUTER) as (endpoint, sock):

        def answer() -> None:
            if sock.poll(30_000):
                routing_id, *_ = sock.recv_multipart()
                sock.send_multipart([routing_id, b"what?"])

        thread = threading.Thread(target=answer)
        thread.start()
        what, _ = wrong(endpoint)
        thread.join()
    assert "no message of zmqcore" in what


@pytest.mark.parametrize("endpoint", ["inproc://here", "tcp://nohost", "5555", "tcp://*:5555"])
def test_what_is_no_address_to_look_at(shop: Shop, endpoint: str) -> None:
    ran = shop.run("doctor", "--endpoint", endpoint)
    assert (ran.code, ran.out) == (2, "")
