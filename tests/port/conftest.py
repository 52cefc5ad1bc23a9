"""A port in this process, served by a thread where a test wants that, and bare sockets to talk to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import waiting_support
import zmq

from zmqcore import errors
from zmqcore._frame import Envelope, pack, split
from zmqcore._port import Port
from zmqcore._request import Request

LIMIT = 30.0
"""How long, in seconds, anything may take before a test gives up: a hang, not a promise about speed."""


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


@pytest.fixture
def open_port(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Callable[..., Port]]:
    """``open_port(**options)`` returns a port on a free loopback port."""
    made: list[Port] = []

    def make(*endpoints: str, **options: Any) -> Port:
        port = Port(context, endpoints or ("tcp://127.0.0.1:*",), **options)
        made.append(port)
        return port

    yield make
    for port in made:
        port.close()


@pytest.fixture
def port(open_port: Callable[..., Port]) -> Port:
    return open_port()


@pytest.fixture
def held(port: Port) -> Iterator[list[Request]]:
    """The requests that came to ``port``, received on a thread, neither answered nor finished."""
    requests: list[Request] = []

    def run() -> None:
        try:
            while True:
                requests.extend(port.receive())
        except errors.Closed:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield requests
    port.close()
    thread.join(LIMIT)
    assert not thread.is_alive()
    requests.clear()


@pytest.fixture
def serve() -> Iterator[Callable[..., threading.Thread]]:
    """``serve(port)`` answers every call with its own body, on a thread that ends with the port."""
    threads: list[tuple[Port, threading.Thread]] = []

    def run(port: Port) -> None:
        try:
            while True:
                for request in port.receive():
                    if request.wants_reply:
                        request.reply(request.envelope.body)
        except errors.Closed:  # while it waits, or before it has answered
            return

    def start(port: Port) -> threading.Thread:
        thread = threading.Thread(target=run, args=(port,), daemon=True)
        thread.start()
        threads.append((port, thread))
        return thread

    yield start
    for port, thread in threads:
        port.close()
        thread.join(LIMIT)
        assert not thread.is_alive()


class Bare:
    """A bare DEALER (or REQ) that speaks the protocol by hand, and counts on acknowledgements if asked to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, kind: int) -> None:
        self.socket = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.sent = 0
        self.parts = 0
        self._come: list[Envelope] = []  # left over from a part that held more

    def send_together(self, messages: Iterable[tuple[str, dict[str, Any]]], *, flags: int = 1) -> int:
        """Send these messages, pairs of kind and fields, in one part; return the number of the last one."""
        part = b""
        for kind, fields in messages:
            self.sent += 1
            part += pack(kind, flags=flags, **{"id": self.sent, **fields})[0]
        self.socket.send(part)
        return self.sent

    def send(self, kind: str, *, flow: bool = True, **fields: Any) -> int:
        self.sent += 1
        fields.setdefault("id", self.sent)
        self.socket.send_multipart(pack(kind, flags=int(flow), **fields))
        return self.sent

    def receive(self) -> Envelope:
        if not self._come:
            assert self.socket.poll(int(LIMIT * 1000)), "nothing comes"
            head, *buffers = self.socket.recv_multipart()
            self.parts += 1
            self._come = [Envelope.parse([envelope, *buffers]) for envelope in split(head)]
        return self._come.pop(0)

    def receive_kind(self, kind: str) -> Envelope:
        """Receive until an envelope of this kind comes."""
        while (envelope := self.receive()).kind != kind:
            pass
        return envelope

    def acknowledged(self, number: int) -> list[Envelope]:
        """Receive until ``number`` has been acknowledged; return everything that came."""
        came = [self.receive()]
        while came[-1].ack < number:
            came.append(self.receive())
        return came

    def nothing_comes(self, ms: int = 60) -> bool:
        return not self._come and not self.socket.poll(ms)


@pytest.fixture
def bare(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Callable[..., Bare]]:
    """``bare(endpoint, kind=zmq.DEALER)`` returns a connected bare socket."""
    made: list[Bare] = []

    def make(endpoint: str, kind: int = zmq.DEALER) -> Bare:
        made.append(Bare(context, endpoint, kind))
        return made[-1]

    yield make
    for one in made:
        one.socket.close(linger=0)


@pytest.fixture
def until() -> Callable[..., None]:
    """``until(condition, what)`` waits until the condition holds."""
    return waiting_support.until
